"""Training: the only room that knows mmengine's inside."""
