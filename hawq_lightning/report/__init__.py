"""What people look at: report.html with its figures, and the model card."""

from hawq_lightning.report.card import model_card
from hawq_lightning.report.page import write_report

__all__ = ["model_card", "write_report"]
