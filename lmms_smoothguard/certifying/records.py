"""What a finished run leaves beside its certificates: `certify.json`, `certificates.parquet` and the curves."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lmms_smoothguard.attacking.store import Store
from lmms_smoothguard.certifying.asked import FEATURES, Certification
from lmms_smoothguard.certifying.curves import curves, draw
from lmms_smoothguard.certifying.figures import Records, figures
from lmms_smoothguard.certifying.workers import Worker
from lmms_smoothguard.errors import SmoothGuardError
from lmms_smoothguard.evaluation.figures import Figure
from lmms_smoothguard.evaluation.machine import machine, versions
from lmms_smoothguard.evaluation.records import DataRecord, ModelRecord
from lmms_smoothguard.evaluation.samples import SCHEMA_VERSION
from lmms_smoothguard.evaluation.schema import STRICT, parsed, written

RECORD, TABLE = "certify.json", "certificates.parquet"
SCOPE = (
    "L2 norm of the tensor the noise enters: [0, 1] pixel units at the model's resolution, after resize, one frame; per picture or "
    "question, each at its own alpha"
)

AMPLITUDE = "amplitude"
"""In a run's settings: that noise and radii are of waveforms."""
SCOPE_OF_SOUNDS = (
    "L2 norm of the waveforms the noise enters: amplitude (full scale 1) at the model's rate, all samples of a question's sounds; per "
    "question, each at its own alpha"
)


@dataclass(frozen=True, kw_only=True)
class CertificateRecord:
    """One run of `smoothguard certify`.

    settings: what every certificate hangs on; asked: what only the figures hang on; figures: by name, see `figures.figures`; curves:
    over `radius`, null where nothing is certified; largest: the radius from which on n and alpha certify nothing, whatever the
    model, by similarity (answers and classes: "0"); scope: what a radius is a norm of.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT
    name: str
    about: str
    command: str
    model: ModelRecord
    data: DataRecord
    settings: dict[str, Any]
    asked: dict[str, Any]
    figures: dict[str, Figure]
    curves: dict[str, list[float | None]]
    largest: dict[str, float | None]
    seeds: dict[str, int | None]
    versions: dict[str, str | None]
    environment: dict[str, str | int | float | None]
    scope: str = SCOPE
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """As the file has it."""
        plain = {"schema_version": self.schema_version, **dataclasses.asdict(self)}
        return plain | {"figures": {name: figure.to_dict() for name, figure in self.figures.items()}}


def finished(
    store: Store, asked: Certification, command: str, settings: Mapping[str, Any], records: Records, worker: Worker
) -> tuple[CertificateRecord, list[Path]]:
    """Writes everything, and returns the record and the files. Raises SmoothGuardError where they cannot be written."""
    similarities = (0.0, asked.similarity) if asked.what == FEATURES else (0.0,)
    record = CertificateRecord(
        name="certify",
        about=f"{asked.what} of {settings['model']['name']} on {settings['data']['source']}",
        command=command,
        model=ModelRecord(name=settings["model"]["name"], fingerprint=settings["model"]["fingerprint"]),
        data=DataRecord(**settings["data"]),
        settings=json.loads(json.dumps(settings)),
        asked={
            "radii": list(asked.radii),
            "similarity": asked.similarity,
            "n0": asked.n0,
            "beta": asked.served_beta,
        },
        figures=figures(asked, records, worker),
        curves=curves(asked, records, worker),
        largest={f"{similarity:g}": worker.largest(similarity) for similarity in similarities},
        seeds={"noise": asked.seed, "bootstrap": asked.seed},
        versions=versions(),
        environment=machine(),
        scope=SCOPE_OF_SOUNDS if "noise_space" in settings["certificate"] else SCOPE,
    )
    store.write(RECORD, written(CertificateRecord, record.to_dict(), RECORD).encode())
    store.write(TABLE, _table(records))
    return record, [store.root / RECORD, store.root / TABLE, *draw(record, store.root)]


def read_certificates(path: Path) -> CertificateRecord:
    """The record of a run. Raises SmoothGuardError for a file that is missing, no strict JSON, or of another schema."""
    if not path.is_file():
        raise SmoothGuardError(f"no record at {path}; expected the {RECORD} of `smoothguard certify`")
    return parsed(CertificateRecord, path.read_text(encoding="utf-8"), str(path))


def _table(records: Records) -> bytes:
    """A row a certificate; how long it took stays in the records, so that the table is the same however a run was cut up."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise SmoothGuardError(
            "the table of certificates needs pyarrow, which is not installed; pip install 'lmms-smoothguard[report]'"
        ) from error
    rows = [_row(record) for record in records]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    return sink.getvalue()


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    certificate = dict(record["certificate"])
    bound = certificate.pop("bound", None)
    row = {key: record[key] for key in ("id", "digest", "question", "group", "label")}
    row |= {key: record[key] for key in ("selected", "right", "clean_answer") if key in record}
    # A class certificate's `label` and `selected` are places among the classes; the row has their names.
    row |= {key: value for key, value in certificate.items() if not isinstance(value, dict) and key not in row}
    split = bound["split"] if isinstance(bound, dict) else certificate.get("split", {})
    row |= {f"alpha_{name}": share for name, share in split.items()}
    row["bound"] = bound["method"] if isinstance(bound, dict) else bound
    if "tokens" in record:
        row |= {f"token_{name}": record["tokens"][name] for name in ("scores", "lowers")}
        row["token_alpha"] = record["tokens"]["token_alpha"]
    return row
