"""DICOM files give the pixels that they were made from, and of their headers only what is asked for."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from finetune.data.opening import Unreadable, Window, open_image, parse_window
from PIL import Image

pydicom = pytest.importorskip("pydicom")

from finetune.sources.dicom import image_opener, open_dicom_or_image  # noqa: E402
from pydicom import uid  # noqa: E402
from pydicom.data import get_testdata_file  # noqa: E402
from small_dicom import dicom_bytes, dicom_dataset  # noqa: E402

GREY = np.random.default_rng(0).integers(0, 256, (96, 80), dtype=np.uint8)
WIDE = {"WindowCenter": 32768, "WindowWidth": 65536}  # of all 16 bits
COMPRESSED = [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless]


def shown(content: bytes, window: Window = "file") -> np.ndarray:
    return open_dicom_or_image(content, window).pixels


@pytest.fixture(scope="module")
def png(request: pytest.FixtureRequest) -> np.ndarray:
    """The pixels of a chest X-ray of nih-mini, or of noise where that is not there."""
    folder = Path(__file__).parents[5] / "shared/data/nih-mini"
    path = next(iter(sorted(folder.glob("images_*/images/*.png"))), None)
    if path is None:
        return GREY
    with Image.open(path) as image:
        return np.asarray(image.convert("L"))


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, *COMPRESSED])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 16])
def test_pixels_are_those_of_the_png(png: np.ndarray, bits: int, photometric: str, syntax: uid.UID) -> None:
    stored = 255 - png if photometric == "MONOCHROME1" else png
    if bits == 8:
        dataset = dicom_dataset(stored, photometric)
    else:
        dataset = dicom_dataset(stored.astype(np.uint16) * 257, photometric, **WIDE)
    if syntax in COMPRESSED:
        dataset.compress(syntax, generate_instance_uid=False)
    dataset.file_meta.TransferSyntaxUID = syntax
    np.testing.assert_array_equal(shown(dicom_bytes(dataset)), png)


def renamed(content: bytes, true: uid.UID, named: uid.UID) -> bytes:
    """A file with another name of its transfer syntax, and everything else as it was."""
    old, new = (syntax.encode() + b"\0" * (len(syntax) % 2) for syntax in (true, named))
    tag = b"\x02\x00\x10\x00UI"
    renamed = content.replace(tag + len(old).to_bytes(2, "little") + old, tag + len(new).to_bytes(2, "little") + new)
    group = content.index(b"\x02\x00\x00\x00UL\x04\x00") + 8
    size = int.from_bytes(content[group : group + 4], "little") + len(new) - len(old)
    return renamed[:group] + size.to_bytes(4, "little") + renamed[group + 4 :]


@pytest.mark.parametrize("true", [uid.ExplicitVRLittleEndian, *COMPRESSED])
@pytest.mark.parametrize("named", [uid.ExplicitVRLittleEndian, *COMPRESSED, uid.JPEGBaseline8Bit])
def test_a_wrong_transfer_syntax_is_seen_through(true: uid.UID, named: uid.UID) -> None:
    dataset = dicom_dataset(GREY)
    if true in COMPRESSED:
        dataset.compress(true, generate_instance_uid=False)
    content = dicom_bytes(dataset)
    np.testing.assert_array_equal(shown(renamed(content, true, named)), GREY)


def test_rescale_and_window_are_those_of_the_standard() -> None:
    """CT: stored values, a slope and an intercept, and a window in Hounsfield units, by the standard's own formula."""
    stored = np.random.default_rng(1).integers(0, 4096, (20, 20)).astype(np.uint16)
    hounsfield = stored * 2.0 - 1024
    dataset = dicom_dataset(
        stored, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=[40, 300], WindowWidth=[400, 1500]
    )
    below, above = hounsfield <= 40 - 0.5 - 399 / 2, hounsfield > 40 - 0.5 + 399 / 2
    expected = np.where(below, 0, np.where(above, 255, ((hounsfield - 39.5) / 399 + 0.5) * 255))
    assert np.abs(shown(dicom_bytes(dataset)) - expected).max() <= 0.5
    other = np.clip(((hounsfield - 299.5) / 1499 + 0.5) * 255, 0, 255)
    assert np.abs(shown(dicom_bytes(dataset), (300, 1500)) - other).max() <= 0.5


def test_sigmoid_windows() -> None:
    stored = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    dataset = dicom_dataset(stored, WindowCenter=2000, WindowWidth=800, VOILUTFunction="SIGMOID")
    expected = 255 / (1 + np.exp(-4 * (stored - 2000.0) / 800))
    assert np.abs(shown(dicom_bytes(dataset)) - expected).max() <= 0.51


def test_without_a_window_percentiles_are_taken() -> None:
    stored = (GREY.astype(np.uint16) + 700) * 3
    low, high = np.percentile(stored, [1, 99])
    expected = np.clip((stored - low) * 255 / (high - low), 0, 255)
    assert np.abs(shown(dicom_bytes(dicom_dataset(stored))) - expected).max() <= 0.5
    broken = dicom_dataset(stored, WindowCenter=0, WindowWidth=0)
    assert np.abs(shown(dicom_bytes(broken)) - expected).max() <= 0.5


def test_a_signed_image_with_a_window_is_scaled_to_all_shades() -> None:
    """Pydicom's own file, whose windowed values go from -19,366 to 32,767."""
    content = Path(get_testdata_file("MR_small.dcm")).read_bytes()
    stored = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    expected = np.clip(((stored - 599.5) / 1599 + 0.5) * 255, 0, 255)
    assert np.abs(shown(content) - expected).max() <= 0.5


def test_lookup_tables() -> None:
    """A VOI LUT that inverts 12 bits, and before it a modality LUT."""
    shades = np.arange(4096).reshape(64, 64)
    voi = pydicom.Dataset()
    voi.LUTDescriptor, voi.LUTData = [4096, 0, 12], list(range(4095, -1, -1))
    voi["LUTDescriptor"].VR = voi["LUTData"].VR = "US"
    dataset = dicom_dataset(shades.astype(np.uint16), VOILUTSequence=[voi], WindowCenter=1, WindowWidth=2)
    expected = (4095 - shades) * 255 / 4095
    assert np.abs(shown(dicom_bytes(dataset)) - expected).max() <= 0.5
    modality = pydicom.Dataset()
    modality.LUTDescriptor, modality.LUTData = [4096, 0, 16], [value // 2 for value in range(4096)]
    modality.ModalityLUTType = "US"
    modality["LUTDescriptor"].VR = modality["LUTData"].VR = "US"
    dataset.ModalityLUTSequence = [modality]
    expected = (4095 - shades // 2) * 255 / 4095
    assert np.abs(shown(dicom_bytes(dataset)) - expected).max() <= 0.5


def test_colours() -> None:
    """RGB, and pydicom's files in YBR and with a palette, against what pydicom and PIL give."""
    colour = np.random.default_rng(2).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    np.testing.assert_array_equal(shown(dicom_bytes(dicom_dataset(colour, "RGB"))), colour)
    grey = np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(shown(dicom_bytes(dicom_dataset(grey, "RGB"))), GREY)
    content = Path(get_testdata_file("examples_palette.dcm")).read_bytes()
    assert shown(content).shape == (350, 800, 3)


def test_only_patient_view_sex_and_age_are_read() -> None:
    header = {"PatientID": "P 7", "ViewPosition": "PA", "PatientSex": "F", "PatientAge": "058Y", "InstitutionName": "x"}
    found = open_dicom_or_image(dicom_bytes(dicom_dataset(GREY, **header)), "file").header
    assert found == {"patient": "P 7", "view": "PA", "sex": "F", "age": "40-64"}
    assert open_dicom_or_image(dicom_bytes(dicom_dataset(GREY)), "file").header == {}


def test_what_cannot_be_used_is_told() -> None:
    frames = dicom_dataset(GREY, NumberOfFrames=2)
    frames.PixelData = GREY.tobytes() * 2
    huge = dicom_dataset(GREY)
    huge.Rows = huge.Columns = 30_000
    text = dicom_dataset(GREY)
    del text.PixelData
    whole = dicom_bytes(dicom_dataset(GREY))
    expected = {
        dicom_bytes(frames): "holds 2 frames: expected one, write each to a file of its own",
        dicom_bytes(huge): "has more than 89,478,485 pixels",
        dicom_bytes(text): "is DICOM without an image",
        whole[:-500]: r"can't be decoded as DICOM \(",
    }
    for content, words in expected.items():
        with pytest.raises(Unreadable, match=words):
            shown(content)


def test_files_without_preamble_and_other_images_are_read() -> None:
    bare, png = io.BytesIO(), io.BytesIO()
    dataset = dicom_dataset(GREY)
    dataset.file_meta.clear()
    pydicom.dcmwrite(bare, dataset, implicit_vr=True, little_endian=True)
    assert bare.getvalue()[:2] == b"\x08\x00"
    Image.fromarray(GREY).save(png, "PNG")
    for file in (bare, png):
        np.testing.assert_array_equal(shown(file.getvalue()), GREY)
    with pytest.raises(Unreadable, match="is no PNG"):
        shown(b"text")


def test_without_pydicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.sources.dicom.find_spec", lambda name: None)
    assert image_opener() is open_image
    with pytest.raises(Unreadable, match=r"is DICOM, which pip install 'inmerge_optim\[dicom\]' lets be read"):
        open_image(dicom_bytes(dicom_dataset(GREY)), parse_window("file"))
