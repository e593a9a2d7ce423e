"""What the tests share: model folders with random weights, real photos, a hub without a network."""
