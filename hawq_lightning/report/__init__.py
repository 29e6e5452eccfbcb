"""What people look at: report.html with its figures, and the model card."""

from hawq_lightning.report.card import model_card
from hawq_lightning.report.page import write_report
from hawq_lightning.report.sweep_page import collect

__all__ = ["collect", "model_card", "write_report"]
