"""Console scripts: Hydra mains and what they run."""

from hawq_lightning.cli._analyze import main as analyze_main
from hawq_lightning.cli._build import make_companions, make_data, make_task, make_trainer
from hawq_lightning.cli._calibration import CalibrationBatches
from hawq_lightning.cli._collect import main as collect_main
from hawq_lightning.cli._dry_run import budget_ranges, dry_run, estimate_seconds
from hawq_lightning.cli._entry import check_choices, explain, quiet_down, sweep_dirname_overrides
from hawq_lightning.cli._export import main as export_main
from hawq_lightning.cli._export_run import export_run
from hawq_lightning.cli._frontier_table import frontier_rows, show_frontier, show_outlook, size_lines
from hawq_lightning.cli._onnx import Images, mean_average_precision, write_onnx
from hawq_lightning.cli._per_image import keep_per_image
from hawq_lightning.cli._progress_bar import PlainProgressBar
from hawq_lightning.cli._recorder import Recorder
from hawq_lightning.cli._records import read_manifest, read_record, sealed_text
from hawq_lightning.cli._renamed_keys import check_renamed
from hawq_lightning.cli._resume import settings_hash
from hawq_lightning.cli._run import run
from hawq_lightning.cli._speeds import uniform
from hawq_lightning.cli._train import main as train_main
from hawq_lightning.cli._trusted import check_targets

__all__ = [
    "CalibrationBatches",
    "Images",
    "PlainProgressBar",
    "Recorder",
    "analyze_main",
    "budget_ranges",
    "check_choices",
    "check_renamed",
    "check_targets",
    "collect_main",
    "dry_run",
    "estimate_seconds",
    "explain",
    "export_main",
    "export_run",
    "frontier_rows",
    "keep_per_image",
    "make_companions",
    "make_data",
    "make_task",
    "make_trainer",
    "mean_average_precision",
    "quiet_down",
    "read_manifest",
    "read_record",
    "run",
    "sealed_text",
    "settings_hash",
    "show_frontier",
    "show_outlook",
    "size_lines",
    "sweep_dirname_overrides",
    "train_main",
    "uniform",
    "write_onnx",
]
