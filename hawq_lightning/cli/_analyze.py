"""``hawq-lightning-analyze``: sites, traces, frontier, plan and report of a trained network, no training."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from hawq_lightning.cli._entry import CONFIG_PATH, run_job, run_main


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="analyze")
def _main(cfg: DictConfig) -> object:
    def job() -> None:
        if cfg.dry_run:
            from hawq_lightning.cli._dry_run import dry_run

            dry_run(cfg)
        else:
            from hawq_lightning.cli._frontier_table import show_frontier, show_outlook
            from hawq_lightning.cli._run import run

            run(cfg)
            if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
                show_frontier(Path(cfg.paths.output_dir))
                show_outlook(Path(cfg.paths.output_dir))

    return run_job(job)


def main() -> None:
    """The console script."""
    if "dry_run=true" in sys.argv[1:]:  # a look writes nothing, not even a run folder
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]
    run_main(_main)


if __name__ == "__main__":
    main()
