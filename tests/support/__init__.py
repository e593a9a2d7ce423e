"""Test helpers: model folders with random weights, real photos, and an offline hub cache."""
