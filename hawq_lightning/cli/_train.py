"""``hawq-lightning``: train, measure, choose, fine-tune, pack, report."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from hawq_lightning.cli._entry import CONFIG_PATH, run_job, run_main


@hydra.main(version_base="1.3", config_path=CONFIG_PATH, config_name="train")
def _main(cfg: DictConfig) -> object:
    def job() -> float | None:
        from hawq_lightning.cli._run import run

        record = run(cfg)
        for metric in ("monitor", "accuracy", "map"):  # what a sweeper maximizes
            if metric in record:
                score: float | None = record[metric].get("fine_tuned", record[metric].get("quantized"))
                return score
        return None

    return run_job(job)


def main() -> None:
    """The console script."""
    run_main(_main)


if __name__ == "__main__":
    main()
