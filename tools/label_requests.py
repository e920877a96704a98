# SPDX-License-Identifier: Apache-2.0
"""Requests to a MONAI Label server, with the standard library alone, and what an answer is.

``monailabel.client`` does not fit: it needs MONAI Label's environment and turns an error of the server into a
traceback of the client, without the server's reason.
"""

from __future__ import annotations

import difflib
import email
import hashlib
import json
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# Of the server, for every model; the last two are of dmri2noddi, where an image is sent without its gradients.
LABEL_OPTIONS = ("result_extension", "result_dtype", "result_compress", "save_label", "label_tag", "bvals", "bvecs")
# Endings that Path.suffix would cut in two.
DOUBLE_SUFFIXES = (".nii.gz", ".seg.nrrd")


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        parameters: the JSON part; ``label_names`` and ``latencies`` are MONAI Label's, the rest the bundle's.
        content: bytes of the file; empty where there is only JSON.
        suffix: of the file, as ``.nii.gz``.
        seconds: wall time of the request.
    """

    parameters: dict[str, Any]
    content: bytes
    suffix: str
    seconds: float
    sha256: str = field(default="")

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", hashlib.sha256(self.content).hexdigest())


def get_json(url: str, path: str, *, timeout: float = 60) -> Any:
    """JSON of ``GET url/path``. Raises ConnectionError as `send` does."""
    return json.loads(send(urllib.request.Request(_address(url, path)), timeout=timeout)[1])


def post_json(url: str, path: str, content: Mapping[str, Any], *, timeout: float = 60) -> Any:
    """JSON of ``POST url/path`` with a JSON body. Raises ConnectionError as `send` does."""
    body = json.dumps(content).encode()
    request = urllib.request.Request(_address(url, path), data=body, headers={"Content-Type": "application/json"})
    return json.loads(send(request, timeout=timeout)[1])


def wait_until_ready(url: str, *, timeout: float = 180, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait for a server that is starting: it builds every bundle first.

    Args:
        url: of the server.
        timeout: seconds.
        alive: whether its process still runs.

    Raises:
        TimeoutError: it did not answer in time, or its process ended.
    """
    started = time.monotonic()
    while alive() and time.monotonic() - started < timeout:
        try:
            get_json(url, "info/", timeout=10)
            return
        except ConnectionError:
            time.sleep(1)
    raise TimeoutError(f"{url}: expected a server within {timeout:.0f} s; read its log, one bad bundle stops all")


def check_names(url: str, model: str, parameters: Mapping[str, Any]) -> None:
    """Refuse options that a model does not have: the server ignores them without a word.

    Raises:
        ValueError: unknown model or option; the message suggests the nearest one.
        ConnectionError: as `send`.
    """
    models = get_json(url, "info/")["models"]
    if model not in models:
        raise ValueError(f"{model}: expected one of {sorted(models)}, which this server has")
    known = [*models[model]["config"], *LABEL_OPTIONS]
    for name in parameters:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name}: expected an option of {model}: {', '.join(known)}{meant}")


def infer(
    url: str,
    model: str,
    image: str = "",
    *,
    parameters: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
    timeout: float = 3600,
) -> Answer:
    """One inference.

    Args:
        url: of the server, ``http://127.0.0.1:8000``.
        model: name of a bundle.
        image: id of a file in the studies folder; where a model reads none, any word.
        parameters: options of the model.
        file: a file to send instead of an id.
        timeout: seconds; a server that works on another request answers after that one.

    Raises:
        ConnectionError: no server, or its error. The message starts with the address.
        ValueError: neither image nor file; an answer in another form.
        FileNotFoundError: no such file.
    """
    if not image and file is None:
        raise ValueError("image: expected the id of a study or --file; list the ids with: GET /datastore/?output=all")
    parts: list[tuple[str, str, bytes]] = [("params", "", json.dumps(dict(parameters or {})).encode())]
    if file is not None:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: expected a file to send, but there is none; correct the path")
        parts.append(("file", Path(file).name, Path(file).read_bytes()))
    query = urllib.parse.urlencode({"output": "all", **({"image": image} if image else {})})
    boundary = secrets.token_hex(16)
    request = urllib.request.Request(
        _address(url, f"infer/{urllib.parse.quote(model)}?{query}"),
        data=as_multipart(parts, boundary),
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    started = time.perf_counter()
    kind, body = send(request, timeout=timeout)
    seconds = time.perf_counter() - started
    if not kind.startswith("multipart/"):
        return Answer(json.loads(body) or {}, b"", "", seconds)
    described, content, name = b"{}", b"", ""
    for part_name, file_name, payload in from_multipart(kind, body):
        if part_name == "params":
            described = payload
        else:
            content, name = payload, file_name
    return Answer(json.loads(described), content, suffix_of(name), seconds)


def send(request: urllib.request.Request, *, timeout: float) -> tuple[str, bytes]:
    """Content type and body of the answer.

    Raises:
        ConnectionError: no server or an error of it; the message starts with the address and ends with the reason.
    """
    # A proxy of the environment must not see images, nor stand between us and 127.0.0.1.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.headers.get("Content-Type", ""), answer.read()
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace").strip()[:2000]
        raise ConnectionError(f"{request.full_url}: the server answered {error.code}: {reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionResetError) as error:
        cause = getattr(error, "reason", error)
        raise ConnectionError(
            f"{request.full_url}: expected a running server, got: {cause}; start it with "
            "python -m tools.serve_label start"
        ) from error


def as_multipart(parts: Sequence[tuple[str, str, bytes]], boundary: str) -> bytes:
    """Body of ``multipart/form-data``: parts of name, file name ("" is a plain field) and bytes."""
    body = bytearray()
    for name, file_name, content in parts:
        safe = file_name.replace("\\", "_").replace('"', "_").replace("\r", "_").replace("\n", "_")
        shown = f'; filename="{safe}"' if file_name else ""
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{shown}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return bytes(body + f"--{boundary}--\r\n".encode())


def from_multipart(kind: str, body: bytes) -> list[tuple[str, str, bytes]]:
    """Parts of a ``multipart/form-data`` answer as name, file name, bytes.

    ``email`` parses the headers alone: a whole message is for text, and its line ends belong to the file here.

    Raises:
        ValueError: no boundary in ``kind``, or none in the body.
    """
    boundary = email.message_from_string(f"Content-Type: {kind}").get_boundary()
    pieces = body.split(f"--{boundary}".encode()) if boundary else []
    if len(pieces) < 3:
        raise ValueError(f"{kind}: expected an answer of several parts, got {len(body)} bytes without its boundary")
    parts = []
    for piece in pieces[1:-1]:
        head, _, content = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        headers = email.message_from_bytes(head)
        name = headers.get_param("name", "", header="content-disposition")
        parts.append((str(name), headers.get_filename() or "", content.removesuffix(b"\r\n")))
    return parts


def suffix_of(name: str) -> str:
    """``.nii.gz`` of ``a.b.nii.gz``, ``.png`` of ``a.png``."""
    return next((s for s in DOUBLE_SUFFIXES if name.lower().endswith(s)), Path(name).suffix.lower())


def read_image(path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Values and affine of an answer: ``(X, Y, Z[, N])`` with a 4 x 4 affine, or ``(H, W)`` of a picture with None.

    Raises:
        ValueError: another format.
    """
    suffix = suffix_of(str(path))
    if suffix in (".nii", ".nii.gz"):
        import nibabel

        image: Any = nibabel.load(path)
        return np.asarray(image.dataobj), image.affine
    if suffix in (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg"):
        from PIL import Image

        with Image.open(path) as picture:
            return np.asarray(picture), None
    raise ValueError(f"{path}: expected .nii, .nii.gz or a picture, got {suffix or 'no ending'}; open it elsewhere")


def describe(path: str | Path, answer: Answer) -> dict[str, Any]:
    """File, size, type, range, affine, SHA-256 and seconds of an answer that was saved to ``path``."""
    stated: dict[str, Any] = {"file": str(path), "bytes": len(answer.content), "sha256": answer.sha256}
    if suffix_of(str(path)) not in (".nrrd", ".seg.nrrd"):
        values, affine = read_image(path)
        stated |= {"size": list(values.shape), "dtype": str(values.dtype)}
        stated |= {"minimum": float(values.min()), "maximum": float(values.max())}
        stated["affine"] = None if affine is None else np.round(affine, 4).tolist()
    return {**stated, "seconds": round(answer.seconds, 2)}


def _address(url: str, path: str) -> str:
    if not str(url).startswith(("http://", "https://")):
        raise ValueError(f"url: expected http://HOST:PORT, got {url!r}")
    return f"{str(url).rstrip('/')}/{path}"
