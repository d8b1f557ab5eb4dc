"""Class Rectification Loss for fastai: train image classifiers on badly imbalanced data.

`fastai_crl.all` has all that users need, `fastai_crl.losses.criteria` what a criterion of one's own is made of; each
wing shows its own part.
"""

__version__ = "0.1.0"
