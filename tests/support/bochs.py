"""Runs a static program as the only process of a Linux in Bochs, which emulates processors that this machine is not.

Needs, on Debian: `apt-get install bochs bochsbios xorriso isolinux syslinux-common linux-image-cloud-amd64`. The last
one is there for its kernel alone, whose file may also be copied to /boot by hand.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

BIOS = Path("/usr/share/bochs/BIOS-bochs-latest")
VIDEO = Path("/usr/share/bochs/VGABIOS-lgpl-latest")
ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
LDLINUX = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
OPTIONS = "console=ttyS0 quiet nokaslr mitigations=off acpi=off noapic nolapic tsc=unstable lpj=1000000"
SETTINGS = """\
cpu: model=corei7_icelake_u, ips=200000000
memory: guest=256, host=256
romimage: file={bios}
vgaromimage: file={video}
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
display_library: rfb, options="timeout=0"
log: bochs.log
clock: sync=none
"""


def kernel() -> Path | None:
    """A Linux kernel of this system."""
    return max(Path("/boot").glob("vmlinuz-*"), default=None)


def missing() -> list[str]:
    """What there is not, of all that it needs."""
    tools = [name for name in ("bochs", "xorriso") if not shutil.which(name)]
    files = [str(path) for path in (BIOS, VIDEO, ISOLINUX, LDLINUX) if not path.exists()]
    return tools + files + ([] if kernel() else ["/boot/vmlinuz-*"])


def run(program: Path, directory: Path, arguments: list[str], until: str, minutes: float = 20) -> str:
    """What a program writes to the console, until that matches a pattern or the time is over."""
    image(program, directory, arguments)
    (directory / "bochsrc").write_text(SETTINGS.format(bios=BIOS, video=VIDEO))
    serial = directory / "serial.txt"
    with subprocess.Popen(["bochs", "-q", "-f", "bochsrc"], cwd=directory, stdin=subprocess.PIPE,
                          stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        assert process.stdin
        process.stdin.write(b"c\n")  # Debian's Bochs starts in its debugger
        process.stdin.flush()
        deadline, shown = time.monotonic() + minutes * 60, ""
        while process.poll() is None and time.monotonic() < deadline and not re.search(until, shown):
            time.sleep(1)
            shown = serial.read_text(errors="replace") if serial.exists() else ""
        process.kill()
    return shown


def image(program: Path, directory: Path, arguments: list[str]) -> None:
    """boot.iso: the kernel, and a file system that holds the program and a console."""
    tree = directory / "iso"
    tree.mkdir()
    for file in (ISOLINUX, LDLINUX):
        shutil.copy(file, tree)
    shutil.copy(str(kernel()), tree / "vmlinuz")
    (tree / "initrd").write_bytes(archive(program.read_bytes()))
    append = f"{OPTIONS} -- {' '.join(arguments)}"
    (tree / "isolinux.cfg").write_text(f"default a\nlabel a\n kernel /vmlinuz\n initrd /initrd\n append {append}\n")
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", "boot.iso", "-b", "isolinux.bin", "-c", "boot.cat",
               "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "iso"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


def archive(program: bytes) -> bytes:
    """A cpio archive (newc) with /dev/console and the program as /init."""
    return (entry("dev", 0o40755) + entry("dev/console", 0o20600, device=(5, 1)) + entry("init", 0o100755, program)
            + entry("TRAILER!!!", 0))


def entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    return padded(header + path) + padded(content)


def padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
