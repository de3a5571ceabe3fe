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

LONGEST_FILES = ("test_pipeline.py", "test_report.py", "test_hostile.py", "test_settings.py")  # started first


def pytest_collection_modifyitems(items: list) -> None:
    """Puts the files that take longest first, so that no process is left with one of them at the end."""
    order = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
