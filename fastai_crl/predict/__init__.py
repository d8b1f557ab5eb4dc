"""What is done to images with a trained learner: submissions, test-time augmentation, pictures of predictions."""

from .show import show_predictions
from .submission import write_submission
from .tta import d4_tta

__all__ = ["d4_tta", "show_predictions", "write_submission"]
