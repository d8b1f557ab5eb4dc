"""Class Rectification Loss for fastai: train image classifiers on badly imbalanced data."""

__version__ = "0.1.0"
