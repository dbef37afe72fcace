"""The columns of a click log, and the one error that bad data raises."""

import hashlib
import json
from dataclasses import asdict, dataclass


class DataError(Exception):
    """Input data that cannot be used. The message is one line that names file, line and remedy."""


@dataclass(frozen=True)
class Schema:
    """The columns of a click log in file order: label, then dense, then categorical."""

    name: str
    label: str
    dense: tuple[str, ...]
    categorical: tuple[str, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.label, *self.dense, *self.categorical)

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "Schema":
        return cls(data["name"], data["label"], tuple(data["dense"]), tuple(data["categorical"]))

    def fingerprint(self) -> str:
        """A short hash of the column names and their order, stored wherever the schema must match."""
        text = json.dumps([self.label, self.dense, self.categorical])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# Criteo Kaggle and Criteo Terabyte: a label, 13 counts, 26 values hashed to 32 bits; tabs, no header.
CRITEO = Schema(
    name="criteo",
    label="label",
    dense=tuple(f"int_{i}" for i in range(13)),
    categorical=tuple(f"cat_{i}" for i in range(26)),
)

# How many values each categorical column has. Kaggle: 33,762,577 in all, counted over all of train.txt.
CRITEO_KAGGLE_CARDINALITIES = (
    1_460, 583, 10_131_227, 2_202_608, 305, 24, 12_517, 633, 3,
    93_145, 5_683, 8_351_593, 3_194, 27, 14_992, 5_461_306, 10, 5_652,
    2_173, 4, 7_046_547, 18, 15, 286_181, 105, 142_572,
)  # fmt: skip
# Terabyte: 187,767,399 in all, over 24 days, of values taken modulo 40,000,000 as MLPerf v1 does.
CRITEO_TB_CARDINALITIES = (
    39_884_406, 39_043, 17_289, 7_420, 20_263, 3, 7_120, 1_543, 63,
    38_532_951, 2_953_546, 403_346, 10, 2_208, 11_938, 155, 4, 976,
    14, 39_979_771, 25_641_295, 39_664_984, 585_935, 12_972, 108, 36,
)  # fmt: skip

# Terabyte: rows of days 0 to 22, and bytes of the 24 files, unpacked and as they are handed out.
CRITEO_TB_TRAINING_ROWS = 4_195_197_692
CRITEO_TB_TEXT_BYTES, CRITEO_TB_GZIP_BYTES = 1.11e12, 342 * 2**30

# Name -> rows and cardinalities, as published.
PUBLIC_DATA_SETS = {
    "criteo-kaggle": (45_840_617, CRITEO_KAGGLE_CARDINALITIES),
    "criteo-tb": (4_373_472_329, CRITEO_TB_CARDINALITIES),
}
