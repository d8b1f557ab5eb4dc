"""What is done to images with a trained learner: submissions, test-time augmentation, pictures, a report."""

from .report import write_report
from .show import show_predictions
from .submission import write_submission
from .tta import d4_tta

__all__ = ["d4_tta", "show_predictions", "write_report", "write_submission"]
