"""Videos: the frames that are looked at, and one line for everything that is wrong with a file."""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.model.config.presets import TINY
from herdgraph.model.processing import (
    Frame,
    FrameSampling,
    PromptProcessor,
    boxes,
    films,
    load_image,
    load_video,
    video,
)
from support import clips, herds
from support.clips import COLORS, animation, film

KINDS = {
    "mp4": film(clips.frames()), "webm": film(clips.frames(), kind="webm"),
    "gif": animation(clips.frames(), kind="gif"), "webp": animation(clips.frames()),
}


def seen(frames: list[Frame]) -> list[tuple[float, str]]:
    """Times, and the nearest of the colors."""
    palette = np.array([clips.frames([color])[0].getpixel((0, 0)) for color in COLORS])
    found = []
    for frame in frames:
        pixel = np.array(load_image(frame.picture).getpixel((16, 16)))
        found.append((round(frame.seconds, 3), COLORS[int(np.abs(palette - pixel).sum(axis=1).argmin())]))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_frames_with_their_times(kind: str, tmp_path: Path) -> None:
    (tmp_path / "clip").write_bytes(KINDS[kind])
    whole = [(0.0, "red"), (0.5, "lime"), (1.0, "blue"), (1.5, "white")]
    assert seen(load_video(tmp_path / "clip")) == seen(load_video(KINDS[kind])) == whole
    assert seen(load_video(KINDS[kind], FrameSampling(fps=1))) == whole[::2]
    assert seen(load_video(KINDS[kind], FrameSampling(max_frames=2))) == whole[::2]
    assert seen(load_video(KINDS[kind], FrameSampling(max_frames=1))) == whole[:1]
    assert seen(load_video(KINDS[kind], FrameSampling(fps=30))) == whole, "no frame is taken twice"


def test_keyframes_are_what_the_file_stores_whole() -> None:
    keyframes = FrameSampling(strategy="keyframes")
    assert seen(load_video(film(clips.frames(), kind="webm"), keyframes)) == [(0.0, "red"), (1.0, "blue")]
    assert len(load_video(KINDS["gif"], keyframes)) == 4
    assert len(load_video(KINDS["gif"], FrameSampling(strategy="keyframes", max_frames=3))) == 3


def test_only_groups_with_a_chosen_frame_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour is looked at from its beginning to its end, in as many frames as are asked for."""
    an_hour = film(clips.frames(COLORS * 45), fps=Fraction(1, 20), every=15)
    decoded = []
    actual = films._decoded
    monkeypatch.setattr(films, "_decoded", lambda *given: (decoded.append(1) or frame for frame in actual(*given)))
    frames = load_video(an_hour, FrameSampling(max_frames=4))
    assert [frame.seconds for frame in frames] == [0.0, 900.0, 1800.0, 2700.0]
    assert len(decoded) < 4 * 15 + 1 < 180


def test_frames_that_are_seen_before_the_head_of_their_group() -> None:
    """Of an open group, the first frames that are seen refer to the group before."""
    packets = films._Packets(films.Fraction(1), times=[0, 1, 4, 2, 3], groups=[0, 0, 1, 1, 1], whole=[0, 2],
                             heads=[0, 4], end=5)
    assert packets.choose(FrameSampling(fps=1)) == [0, 1, 3, 4, 2]
    assert packets.groups_of([2]) == {1}
    assert packets.groups_of([3]) == {0, 1}


def test_lists_of_frames() -> None:
    pictures = clips.frames()
    assert [frame.seconds for frame in load_video(pictures, FrameSampling(fps=4))] == [0.0, 0.25, 0.5, 0.75]
    assert load_video(found := load_video(KINDS["mp4"])) == found


def test_large_frames_are_reduced_and_the_aspect_kept() -> None:
    wide = [picture.resize((1600, 400)) for picture in clips.frames(["red"])]
    for clip in (film(wide), animation(wide, kind="gif")):
        assert load_image(load_video(clip)[0].picture).size == (672, 168)


def test_a_film_of_a_phone_on_its_side_is_upright() -> None:
    [left] = clips.frames(["blue"])
    left.paste("red", (0, 0, 16, 32))
    clip = bytearray(film([left]))
    matrix = clip.find(b"tkhd") + 44
    clip[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned = load_image(load_video(bytes(clip))[0].picture)
    assert [COLORS[int(np.argmax(turned.getpixel((16, y))))] for y in (4, 28)] == ["red", "blue"]


# --- in a prompt


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PromptProcessor:
    directory = tmp_path_factory.mktemp("processor")
    herds.write_processor(directory)
    return PromptProcessor(directory, TINY)


def test_a_video_is_pictures_of_one_tile_behind_their_times(processor: PromptProcessor) -> None:
    wide = [picture.resize((112, 28)) for picture in clips.frames()]
    clip = {"type": "video", "data": animation(wide), "max_frames": 2}
    found = processor.prepare([{"role": "user", "content": [clip, {"type": "text", "text": "What?"}]}])
    tile = "<|image_start|><|image|>" + "<|patch|>" * 4 + "<|image_end|>"
    text = processor.tokenizer.decode(found.token_ids, skip_special=False)
    assert f"Time: 0.0s{tile}Time: 1.0s{tile}What?" in text
    assert found.pixel_values is not None
    assert len(found.pixel_values) == 2
    link = {"type": "video_url", "video_url": {"url": _link(animation(wide)), "max_frames": 2}}
    same = processor.prepare([{"role": "user", "content": [link, {"type": "text", "text": "What?"}]}])
    assert same.token_ids == found.token_ids
    np.testing.assert_array_equal(same.pixel_values, found.pixel_values)


def test_a_model_that_reads_text_does_not_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    herds.write_processor(tmp_path)
    monkeypatch.setattr(video, "load_video", None)
    blind = PromptProcessor(tmp_path, herds.variant())
    with pytest.raises(HerdError, match="this model reads text only"):
        blind.prepare([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}])


def _link(data: bytes) -> str:
    import base64

    return "data:video/mp4;base64," + base64.b64encode(data).decode()


# --- what is wrong


def _without_frames() -> bytes:
    import io

    import av

    written = io.BytesIO()
    with av.open(written, "w", format="webm") as container:
        track: Any = container.add_stream("libvpx", rate=2)
        track.width = track.height = 32
        track.pix_fmt = "yuv420p"
        container.start_encoding()
    return written.getvalue()


def _forged(count: int) -> bytes:
    """A film of a few bytes whose index counts frames that are not there."""
    clip = bytearray(KINDS["mp4"])
    at = clip.find(b"stsz")
    clip[at + 8 : at + 16] = struct.pack(">II", 1, count)
    return bytes(clip)


BAD = {
    "not a video": (b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", "is not a video that is read here: MP4, WebM, animated"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(20), "is not a video that is read here"),
    "empty": (b"", "is not a video that is read here"),
    "mp4 cut off": (KINDS["mp4"][:-100], r"is cut off: it has \d+ of \d+ bytes; get it again"),
    "mp4 without index": (KINDS["mp4"][: KINDS["mp4"].find(b"moov") - 4], "is cut off: it has no index"),
    "webm cut off": (KINDS["webm"][:-100], r"is cut off: it has \d+ of \d+ bytes; get it again"),
    "gif cut off": (KINDS["gif"][:-100], "is a broken or unsafe image"),
    "webp cut off": (KINDS["webp"][:-100], "is a broken or unsafe image"),
    "no frames": (_without_frames(), "has no frames"),
    "codec": (film(clips.frames(), kind="matroska", codec="ffv1"), "has the codec ffv1, read are h264, hevc, vp8, vp9"),
    "counted": (_forged(10_000_000), "counts 10000000 frames and pieces of sound, at most 2000000"),
    "packed": (KINDS["mp4"].replace(b"udta", b"cmov"), r"has a packed index \(cmov\)"),
    "boxes": (b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x04moov", "its boxes are not as an MP4 file has them"),
    "webm head": (bytes.fromhex("1a45dfa380") + bytes(20), "there is no segment behind its head"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_videos_are_one_line(case: str, tmp_path: Path) -> None:
    data, message = BAD[case]
    (tmp_path / "clip.mp4").write_bytes(data)
    for source, name in ((data, "the video data"), (tmp_path / "clip.mp4", str(tmp_path / "clip.mp4"))):
        with pytest.raises(HerdError, match=message) as caught:
            load_video(source)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(name)


LIMITS = {
    "bytes": (video, "MAX_BYTES", 100, r"has \d+ bytes, at most 100 are read"),
    "pixels": (films, "MOST_PIXELS", 100, "has 32 x 32 = 1024 pixels, at most 100"),
    "packets": (films, "MOST_PACKETS", 3, "has more than 3 frames: cut it"),
    "samples": (boxes, "MOST_SAMPLES", 3, "counts 4 frames and pieces of sound, at most 3"),
    "seconds": (video, "MOST_SECONDS", 1, "is longer than 1 seconds: cut it"),
    "work": (video, "MOST_WORK", -1.0, "takes more than -1 seconds to decode"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, value, message = LIMITS[limit]
    monkeypatch.setattr(module, name, value)
    with pytest.raises(HerdError, match=message):
        load_video(KINDS["mp4"])


def test_limits_of_animations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MOST_SECONDS", 1)
    with pytest.raises(HerdError, match="the video data is longer than 1 seconds: cut it"):
        load_video(KINDS["gif"])


def test_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(HerdError, match=r"the video data needs PyAV to be read: pip install 'herdgraph\[video\]'"):
        load_video(KINDS["mp4"])
    assert len(load_video(KINDS["webp"])) == 4


@pytest.mark.parametrize(("options", "message"), [
    ({"fps": 0}, "fps is 0, a number above 0"), ({"fps": "2"}, "fps is '2'"), ({"fps": float("nan")}, "fps is nan"),
    ({"max_frames": 0}, "max_frames is 0, it must be within 1 and 256"), ({"max_frames": 2.0}, "max_frames is 2.0"),
    ({"max_frames": 257}, "max_frames is 257"), ({"sampling": "random"}, "sampling is 'random', known are uniform and"),
])
def test_wrong_sampling(options: dict[str, Any], message: str) -> None:
    with pytest.raises(HerdError, match=message):
        FrameSampling.of(options)


@pytest.mark.parametrize(("source", "message"), [
    (3, "a video was given as int"), ([], "a video is a list of 0 frames"), ("none.mp4", "none.mp4 cannot be read"),
    ("/proc/self/mem", "/proc/self/mem cannot be read: "),
])
def test_wrong_sources(source: Any, message: str) -> None:
    with pytest.raises(HerdError, match=message):
        load_video(source)


def test_damaged_files_are_refused_or_read() -> None:
    """The fuzzer (tests/fuzz) goes on where this ends."""
    draw, refused = np.random.default_rng(0), []
    for _ in range(40):
        clip = bytearray(KINDS["webm"])
        clip[int(draw.integers(len(clip)))] ^= 1 << int(draw.integers(8))
        try:
            assert load_video(bytes(clip))
        except HerdError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 40
    assert all(told.startswith("the video data") for told in refused)
