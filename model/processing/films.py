"""MP4 and WebM to frames, by PyAV (FFmpeg), which the extra ``video`` brings.

Files come from strangers. FFmpeg is told the format, may open nothing else (no network, no other file), has a list of
decoders, one thread, and a limit of pixels. A file is gone through twice: once for the times of all frames, without
decoding, and once to decode, of which only groups of pictures that hold a chosen frame are. There is never more in
memory than what a decoder needs, and the chosen frames.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

from ...errors import HerdError
from .containers import Kind
from .frames import FRAME_SIDE, Frame, FrameSampling

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

CODECS = {"h264": "h264", "hevc": "hevc", "vp8": "vp8", "vp9": "vp9", "av1": "libdav1d", "mpeg4": "mpeg4"}
"""Codecs that are read, and the decoder of each."""
MOST_PIXELS = 4096 * 2304
"""Pixels of a frame: 4K. A decoder keeps up to 17 frames, which is 240 MB then."""
MOST_PACKETS = 2_000_000
"""Frames of a file, whose times are held in memory."""

_BUFFER = 1 << 18
_ONE_AT_A_TIME = threading.Lock()  # bounds the memory
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, -180: Image.Transpose.ROTATE_180,
          -90: Image.Transpose.ROTATE_270, 270: Image.Transpose.ROTATE_270}


@dataclass
class _Packets:
    """What a file says of its frames: one entry for each, in the order in which they are decoded.

    Attributes:
        unit: of times, in seconds.
        times: at which they are seen.
        groups: of pictures to which they belong.
        whole: numbers of the frames that are stored whole.
        heads: for each group, when the frame is seen that is stored whole, and with which it begins.
        end: when the last one goes.
    """

    unit: Fraction
    times: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    end: int = 0

    def choose(self, sampling: FrameSampling) -> list[int]:
        """Numbers of the frames that are looked at, in the order of their times."""
        order = sorted(range(len(self.times)), key=self.times.__getitem__)
        place = {number: at for at, number in enumerate(order)}
        first = self.times[order[0]]
        starts = [float((self.times[number] - first) * self.unit) for number in order]
        whole = sorted(place[number] for number in self.whole)
        return [order[at] for at in sampling.choose(starts, float((self.end - first) * self.unit), whole)]

    def groups_of(self, numbers: list[int]) -> set[int]:
        """Groups that have to be decoded to see some frames.

        A frame that is seen before the one with which its group begins refers to the group before, too.
        """
        own = {self.groups[number] for number in numbers}
        early = {group - 1 for number in numbers if self.times[number] < self.heads[group := self.groups[number]]}
        return own | early


def can_read_films() -> bool:
    """Whether the extra that reads them is installed."""
    return importlib.util.find_spec("av") is not None


def read_film(
    file: BinaryIO, kind: Kind, name: str, sampling: FrameSampling, check: Callable[[float], None]
) -> list[Frame]:
    """Frames of a film.

    Args:
        file: that has it.
        kind: of the container.
        name: of the file, for messages.
        sampling: which frames.
        check: is called with the seconds that were looked at so far, again and again, to end what takes too long.

    Raises:
        HerdError: PyAV is not installed, another codec, broken, no frames, too large, or ``check`` ends it.
    """
    try:
        import av  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise HerdError(f"{name} needs PyAV to be read: pip install 'herdgraph[video]'") from error
    try:
        with _ONE_AT_A_TIME:
            with _opened(av, file, kind) as container:
                packets = _packets(container, _track(container, name), name, check)
            with _opened(av, file, kind) as container:
                frames = list(_frames(container, _track(container, name), packets, sampling, check))
    except MemoryError as error:
        raise HerdError(f"there is not enough memory for {name}: make it smaller") from error
    except HerdError:
        raise
    except EOFError as error:
        raise HerdError(f"{name} has no frames") from error
    except Exception as error:  # whatever a decoder raises, it is about this file
        raise HerdError(f"{name} is a broken video: {getattr(error, 'strerror', None) or error}") from error
    if not frames:
        raise HerdError(f"{name} is a broken video: none of its frames can be decoded; get it again")
    return frames


def _opened(av: Any, file: BinaryIO, kind: Kind) -> InputContainer:
    file.seek(0)
    options = {"protocol_whitelist": "none", "format_whitelist": kind, "codec_whitelist": ",".join(CODECS.values()),
               "max_pixels": str(MOST_PIXELS), "threads": "1"}
    return av.open(file, format=kind, options=options, metadata_errors="ignore", buffer_size=_BUFFER)


def _track(container: InputContainer, name: str) -> VideoStream:
    """The track of moving pictures, ready to be decoded."""
    track: Any = container.streams.best("video")
    if track is None:
        raise HerdError(f"{name} has no frames: there is no track of pictures in it")
    context = track.codec_context
    codec = context.codec.canonical_name if context else "unknown"
    if codec not in CODECS:
        raise HerdError(f"{name} has the codec {codec}, read are {', '.join(CODECS)}: convert it")
    if (pixels := context.width * context.height) > MOST_PIXELS:
        raise HerdError(f"{name} has {context.width} x {context.height} = {pixels} pixels, at most {MOST_PIXELS} are "
                        "accepted: make it smaller")
    context.thread_count, context.thread_type = 1, "NONE"
    context.options = {"max_pixels": str(MOST_PIXELS)}
    return track


def _packets(
    container: InputContainer, track: VideoStream, name: str, check: Callable[[float], None]
) -> _Packets:
    found = _Packets(track.time_base or Fraction(1, 1000))
    begin: int | None = None
    for packet in container.demux(track):
        time = packet.pts if packet.pts is not None else packet.dts
        if time is None or not (found.heads or packet.is_keyframe):
            continue
        if packet.is_keyframe:
            found.heads.append(time)
        if packet.is_discard:  # decoded for those behind it, and not seen
            continue
        begin = time if begin is None else begin
        check(float((time - begin) * found.unit))
        if len(found.times) == MOST_PACKETS:
            raise HerdError(f"{name} has more than {MOST_PACKETS} frames: cut it")
        if packet.is_keyframe:
            found.whole.append(len(found.times))
        found.times.append(time)
        found.groups.append(len(found.heads) - 1)
        found.end = max(found.end, time + (packet.duration or 0))
    if begin is None:
        raise HerdError(f"{name} has no frames")
    return found


def _frames(
    container: InputContainer, track: VideoStream, packets: _Packets, sampling: FrameSampling,
    check: Callable[[float], None],
) -> Iterator[Frame]:
    """Decode what was chosen. In the place of a frame that is broken the next one that can be decoded is taken."""
    chosen = packets.choose(sampling)
    first, wanted = min(packets.times), [packets.times[number] for number in chosen][::-1]
    for frame in _decoded(container, track, packets.groups_of(chosen), check):
        time = frame.pts if frame.pts is not None else frame.dts
        if not wanted:
            return
        if time is not None and time >= wanted[-1]:
            while wanted and time >= wanted[-1]:
                wanted.pop()
            yield Frame(float((time - first) * packets.unit), _picture(frame))


def _decoded(
    container: InputContainer, track: VideoStream, groups: set[int], check: Callable[[float], None]
) -> Iterator[av.VideoFrame]:
    """All frames of some groups of pictures."""
    decoder, group, inside = track.codec_context, -1, False
    for packet in container.demux(track):
        check(0.0)
        if packet.pts is None and packet.dts is None:
            continue
        group += packet.is_keyframe
        if inside and group not in groups:
            yield from decoder.decode(None)  # those that waited for their turn
            decoder.flush_buffers()
        inside = group in groups
        if inside:
            yield from decoder.decode(packet)
    if inside:
        yield from decoder.decode(None)


def _picture(frame: Any) -> Image.Image:
    """A frame upright in RGB, large ones reduced."""
    scale = min(1.0, FRAME_SIDE / max(frame.width, frame.height))
    width, height = max(round(frame.width * scale), 1), max(round(frame.height * scale), 1)
    image: Image.Image = frame.to_image(width=width, height=height, interpolation="AREA", threads=1)
    turn = _TURNS.get(frame.rotation)
    return image if turn is None else image.transpose(turn)
