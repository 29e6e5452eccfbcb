"""What people look at: report.html with its figures, and the model card."""

from hawq_lightning._csv import csv_text
from hawq_lightning._io import write_text
from hawq_lightning.report._card import markdown_table, model_card
from hawq_lightning.report._checks import rank_correlations
from hawq_lightning.report._convergence import chosen_sites, draw_eigenvalues, draw_images, draw_steps
from hawq_lightning.report._export_section import sentences, speed_note, speed_rows
from hawq_lightning.report._figure import BLUE, GREEN, ORANGE, SOFT, ReportFigure, canvas, log_scale
from hawq_lightning.report._landscape import draw_landscapes
from hawq_lightning.report._page import draw_all, write_report
from hawq_lightning.report._paper import paper_figures
from hawq_lightning.report._run import LossCheck, read_run
from hawq_lightning.report._summary import doubts, headline, settings, size_rows
from hawq_lightning.report._sweep import read_sweep
from hawq_lightning.report._sweep_page import collect, mean_table, sweep_facts
from hawq_lightning.report._text import names, score, size
from hawq_lightning.report._tradeoff import uniform_points

__all__ = [
    "BLUE",
    "GREEN",
    "ORANGE",
    "SOFT",
    "LossCheck",
    "ReportFigure",
    "canvas",
    "chosen_sites",
    "collect",
    "csv_text",
    "doubts",
    "draw_all",
    "draw_eigenvalues",
    "draw_images",
    "draw_landscapes",
    "draw_steps",
    "headline",
    "log_scale",
    "markdown_table",
    "mean_table",
    "model_card",
    "names",
    "paper_figures",
    "rank_correlations",
    "read_run",
    "read_sweep",
    "score",
    "sentences",
    "settings",
    "size",
    "size_rows",
    "speed_note",
    "speed_rows",
    "sweep_facts",
    "uniform_points",
    "write_report",
    "write_text",
]
