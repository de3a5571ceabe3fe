"""Settings: params.yaml -> typed, frozen dataclasses that check their values.

A table of params.yaml holds rows; each row becomes a dataclass. `build` makes it from the mapping, `rows` has the common keys
of each table, `params` the tables as a whole. The keys of one source, objective or density family are in the file of its name,
as a class `Settings` that extends the common one. Unknown keys, wrong types and impossible values are rejected; the error names
the row and the key.
"""

from pipeline.settings.build import (
    Checked,
    NamedFile,
    build,
    changed_defaults,
    check_that,
    checked_path,
    describe,
    file_setting,
    flatten,
    meanings_of,
    named_files,
)
from pipeline.settings.params import Params, choices, implementation, read_params
from pipeline.settings.rows import (
    AutoencoderSettings,
    ControlSettings,
    DatasetSettings,
    DensitySettings,
    DetectionSettings,
    EvaluationSettings,
    InterpolationSettings,
    ParzenSettings,
    QualitySettings,
    SamplingSettings,
    TrainingSettings,
)

__all__ = [
    "AutoencoderSettings",
    "Checked",
    "ControlSettings",
    "DatasetSettings",
    "DensitySettings",
    "DetectionSettings",
    "EvaluationSettings",
    "InterpolationSettings",
    "NamedFile",
    "Params",
    "ParzenSettings",
    "QualitySettings",
    "SamplingSettings",
    "TrainingSettings",
    "build",
    "changed_defaults",
    "check_that",
    "checked_path",
    "choices",
    "describe",
    "file_setting",
    "flatten",
    "implementation",
    "meanings_of",
    "named_files",
    "read_params",
]
