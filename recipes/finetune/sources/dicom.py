"""DICOM files, read by pydicom: one frame each, grey or in colour, compressed or not.

Of the header the patient's name for them (Patient ID), view, sex and age band are read, and nothing else leaves a file.
"""

import io
import re
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from ..data.opening import MAX_PIXELS, Opened, Unreadable, Window, grey_if_equal, is_dicom, limits, open_image, scaled
from ..errors import first_line
from .ages import age_band

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

_FIRST_ELEMENTS = (b"\x02\x00", b"\x08\x00")  # groups that a file without DICOM's preamble begins with
_HEADER = {"patient": "PatientID", "view": "ViewPosition", "sex": "PatientSex", "age": "PatientAge"}
_ITEM = b"\xfe\xff\x00\xe0"  # that compressed pixels are wrapped in
_RLE_OFFSET = b"\x40\x00\x00\x00"  # of the first segment, behind their number


def image_opener() -> Callable[[bytes, Window], Opened]:
    """What opens image files: DICOM among them, where pydicom is installed."""
    return open_dicom_or_image if find_spec("pydicom") else open_image


def open_dicom_or_image(encoded: bytes, window: Window) -> Opened:
    """Decode a DICOM file, or an image file of another kind."""
    if is_dicom(encoded):
        return open_dicom(encoded, window)
    try:
        return open_image(encoded, window)
    except Unreadable:
        if encoded[:2] not in _FIRST_ELEMENTS:
            raise
        return open_dicom(encoded, window)


def open_dicom(encoded: bytes, window: Window) -> Opened:
    """Decode a DICOM file as it is displayed.

    Grey values pass the modality LUT or rescale slope, then the window: that of the user, or the file's (its VOI LUT,
    or its first window), or where it has none, percentiles; values of 8 bits without one stay as they are. MONOCHROME1
    is inverted.
    """
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pydicom, on headers that bend the rules and can be read nevertheless
            dataset = pydicom.dcmread(io.BytesIO(encoded), force=not is_dicom(encoded))
            return Opened(_displayed(dataset, window), _header(dataset))
    except (Unreadable, MemoryError):
        raise
    except Exception as error:  # whatever pydicom and the decoders raise on a damaged file
        raise Unreadable(f"can't be decoded as DICOM ({first_line(error)})") from error


def _displayed(dataset: "Dataset", window: Window) -> np.ndarray:
    from pydicom.pixels import apply_color_lut, pixel_array

    if "PixelData" not in dataset:
        raise Unreadable("is DICOM without an image")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise Unreadable(f"holds {frames} frames: expected one, write each to a file of its own")
    if dataset.Rows * dataset.Columns > MAX_PIXELS:
        raise Unreadable(f"has more than {MAX_PIXELS:,} pixels: make it smaller")
    dataset.file_meta.TransferSyntaxUID = _true_syntax(dataset)
    values = pixel_array(dataset)
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = apply_color_lut(values, dataset)
    if values.ndim == 3:
        return grey_if_equal(values if values.dtype == np.uint8 else scaled(values, 0, np.iinfo(values.dtype).max))
    shades = _shades(values, dataset, window)
    return 255 - shades if dataset.PhotometricInterpretation == "MONOCHROME1" else shades


def _true_syntax(dataset: "Dataset") -> "UID":
    """The transfer syntax of the pixels by their first bytes, which some files belie; else the one that is named."""
    from pydicom import uid
    from pydicom.encaps import get_frame

    named = uid.UID(dataset.file_meta.get("TransferSyntaxUID") or uid.ExplicitVRLittleEndian)
    if not dataset.PixelData.startswith(_ITEM):
        return uid.ExplicitVRLittleEndian if named.is_encapsulated else named
    frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
    if frame.startswith(b"\xff\x4f\xff\x51"):
        family, usual = uid.JPEG2000TransferSyntaxes, uid.JPEG2000Lossless
    elif frame.startswith(b"\xff\xd8\xff\xf7"):
        family, usual = uid.JPEGLSTransferSyntaxes, uid.JPEGLSLossless
    elif frame.startswith(b"\xff\xd8"):
        family, usual = uid.JPEGTransferSyntaxes, uid.JPEGLosslessSV1 if b"\xff\xc3" in frame else uid.JPEGBaseline8Bit
    elif frame[4:8] == _RLE_OFFSET or not named.is_encapsulated:
        family, usual = uid.RLETransferSyntaxes, uid.RLELossless
    else:
        return named
    return named if named in family else usual


def _shades(stored: np.ndarray, dataset: "Dataset", window: Window) -> np.ndarray:
    """Grey values as they were stored, windowed to uint8."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    values = apply_modality_lut(stored, dataset)
    if window == "file" and dataset.get("VOILUTSequence"):
        bits = dataset.VOILUTSequence[0].LUTDescriptor[2]
        return scaled(apply_voi(np.rint(values).astype(np.int64), dataset), 0, 2**bits - 1)
    if window == "file" and _has_window(dataset):
        # pydicom scales to what the stored bits can hold, signed or not: its ends are what becomes black and white.
        with np.errstate(over="ignore"):
            low, high = apply_windowing(np.array([-1e30, 1e30]), dataset)
            return scaled(apply_windowing(values, dataset), low, high)
    plain = not dataset.get("ModalityLUTSequence") and float(dataset.get("RescaleSlope") or 1) > 0
    if window == "file" and stored.dtype == np.uint8 and plain:
        return scaled(stored, 0, 2**dataset.BitsStored - 1)
    return scaled(values, *limits(values, window))


def _has_window(dataset: "Dataset") -> bool:
    width = dataset.get("WindowWidth")
    if width is None or dataset.get("WindowCenter") is None:
        return False
    return float(width if dataset["WindowWidth"].VM == 1 else width[0]) > 1


def _header(dataset: "Dataset") -> dict[str, str]:
    found = {name: str(dataset.get(keyword) or "").strip() for name, keyword in _HEADER.items()}
    found["age"] = age_band(found["age"]) or ""
    found["sex"] = found["sex"] if re.fullmatch("[FMO]", found["sex"]) else ""
    return {name: value for name, value in found.items() if value}
