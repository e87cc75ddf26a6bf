"""MLflow, when MLFLOW_TRACKING_URI is set; nothing otherwise.

A tracking server that fails does not stop a training: what could not be logged is said and stands in the output folder.
"""
import os
import sys
from pathlib import Path


class Tracker:
    """Logs one training to one MLflow run: MLFLOW_RUN_ID's (as `mlflow run` sets it), a resumed training's, or a new."""

    def __init__(self, resumed_run_id: str | None):
        self.run_id = resumed_run_id
        self._mlflow = None
        self._of_epochs: set[str] = set()  # their curves end with the last epoch, not with the final figures
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            return
        import mlflow  # 1.2 s: only when it is wanted

        def start():
            # An explicit id wins over the environment's inside MLflow, so the environment's is asked first here.
            run_id = os.environ.get("MLFLOW_RUN_ID") or resumed_run_id
            # CPU, memory, disk, network and GPU use, sampled every 10 s, appear as the run's system metrics.
            self.run_id = mlflow.start_run(run_id=run_id, log_system_metrics=True).info.run_id
            self._mlflow = mlflow

        self._try(start)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Marks the run failed when the training raised; MLflow itself would call it finished at exit."""
        if self._mlflow and kind:
            self._try(lambda: self._mlflow.end_run("FAILED"))

    def parameters(self, parameters: dict) -> None:
        """Logs parameters and the git commit; those the run already has (`mlflow run` logs its own) stay as they are."""
        if not self._mlflow:
            return

        def log():
            known = self._mlflow.get_run(self.run_id).data.params
            rest = {name: value for name, value in parameters.items() if name not in known}
            if os.environ.get("GIT_COMMIT") and "git_commit" not in known:
                rest["git_commit"] = os.environ["GIT_COMMIT"]
            self._mlflow.log_params(rest)

        self._try(log)

    def epoch(self, row: dict) -> None:
        """Logs the numbers of one history row at its epoch."""
        if self._mlflow:
            numbers = {name: value for name, value in row.items() if name not in ("epoch", "epochs")}
            self._of_epochs |= numbers.keys()
            self._try(lambda: self._mlflow.log_metrics(numbers, step=row["epoch"]))

    def results(self, output: Path, metrics: dict) -> None:
        """Logs final metrics (the numbers at their top, and of val and test), what lies in plots/, and model.onnx,
        card.json and weights.pt below `model/`; ends the run."""
        if not self._mlflow:
            return

        def log():
            for split in ("val", "test"):
                self._mlflow.log_metrics({f"{split}_{name}": value for name, value in metrics.get(split, {}).items()
                                          if isinstance(value, (int, float))})
            self._mlflow.log_metrics({name: value for name, value in metrics.items() if isinstance(value, (int, float))
                                      and name not in self._of_epochs})
            for name in ("model.onnx", "card.json", "weights.pt"):
                self._mlflow.log_artifact(str(output / name), "model")
            for name in ("metrics.json", "history.jsonl"):
                self._mlflow.log_artifact(str(output / name))
            for plot in sorted((output / "plots").iterdir()):
                self._mlflow.log_artifact(str(plot), "plots")
            self._mlflow.end_run()

        self._try(log)

    def _try(self, action) -> None:
        try:
            action()
        except Exception as error:  # MLflow's own, requests' and urllib3's; none is worth a lost training
            print(f"warning: MLflow could not log ({type(error).__name__}: {str(error)[:300]}). The files are in the "
                  "output folder.", file=sys.stderr, flush=True)
