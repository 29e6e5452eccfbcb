"""``hawq-lightning-export``: ONNX and torch.export program of a finished run, compared and measured."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from hawq_lightning.cli._entry import CONFIG_PATH, run_job, run_main


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="export")
def _main(cfg: DictConfig) -> object:
    def job() -> None:
        from hawq_lightning.cli._export_run import export_run

        export_run(cfg)

    return run_job(job)


def main() -> None:
    """The console script."""
    run_main(_main)


if __name__ == "__main__":
    main()
