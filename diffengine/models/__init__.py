"""Models: one folder per model, all behind the contract of `base.py`.

To add one: a folder here with a final subclass of `TrainableModel` (or `MaskedImageModel`), and a config
whose `model` names it. Nothing else knows models by name.
"""
