"""What tests share."""

from __future__ import annotations

import os

# Before torch is imported anywhere: tests run side by side on small machines, and never track.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRACKING"] = "off"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
for name in (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_RUN_ID",
    "PROCESSES",
    "RANK",
    "WORLD_SIZE",
    "DVC_ROOT",
    "DVC_STAGE",
    "DVC_EXP_NAME",
):
    os.environ.pop(name, None)
