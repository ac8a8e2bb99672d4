"""System calls that programs cannot make: a seccomp filter as a classic BPF program.

A second wall behind the namespaces: kernel interfaces that no Python program needs (tracing, keys,
bpf, io_uring, …), and calls by which a program could change the sandbox's first process.
"""

from __future__ import annotations

import platform
import struct

#: AUDIT_ARCH constant by machine.
_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
#: System calls refused with EPERM: name → number on x86_64 and aarch64.
_REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280), "perf_event_open": (298, 241),
    "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89), "syslog": (103, 116),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "quotactl": (179, 60),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "socket": (41, 198),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "ioprio_set": (251, 30),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "personality": (135, 92),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "io_setup": (206, 0),
    "fsconfig": (431, 431), "fspick": (433, 433), "fanotify_init": (300, 262), "kexec_file_load": (320, 294),
    "quotactl_fd": (443, 443), "lookup_dcookie": (212, 18), "vhangup": (153, 58), "mbind": (237, 235),
    "set_mempolicy": (238, 237), "set_mempolicy_home_node": (450, 450), "shmat": (30, 196),
}  # fmt: skip
#: Further ones of x86_64: modify_ldt, iopl, ioperm.
_REFUSED_X86 = (154, 172, 173)
#: Number of mmap, refused with MAP_SHARED: memory that is shared is not counted when one process
#: fills it and another one keeps it.
_MMAP, _MAP_SHARED = (9, 222), 1
#: Numbers from here on do not exist: calls newer than this list.
_UNKNOWN = 457
#: Number of prlimit64, refused for other processes than the caller's.
_PRLIMIT = (302, 261)
#: Numbers of clone, refused with a flag of `_NAMESPACES`, and clone3, whose flags are hidden.
_CLONE, _CLONE3 = (56, 220), 435
_NAMESPACES = 0x7E020000
_EPERM, _ENOSYS = 1, 38
#: Where the low halves of the first and the fourth argument are.
_FIRST, _FOURTH = 16, 40
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
#: Numbers from here on are of the x32 ABI, which would pass by the numbers above.
_X32, _AT_LEAST = 0x40000000, 0x35


def seccomp_filter(machine: str | None = None) -> bytes | None:
    """BPF program for bubblewrap's `--seccomp`; `None`: not available for this machine.

    Args:
        machine: as `platform.machine()`.
    """
    machine = machine or platform.machine()
    if machine not in _ARCH:
        return None
    column = list(_ARCH).index(machine)
    numbers = sorted([pair[column] for pair in _REFUSED.values()] + list(_REFUSED_X86) * (column == 0))
    program = [
        (_LOAD, 0, 0, 4),  # architecture
        (_EQUAL, 1, 0, _ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # number of the call
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_AT_LEAST, 0, 1, _UNKNOWN),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    for number in numbers:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    program += [
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        *_refused_with(_CLONE[column], _FIRST, _NAMESPACES),
        *_refused_with(_MMAP[column], _FOURTH, _MAP_SHARED),
        (_EQUAL, 0, 3, _PRLIMIT[column]),
        (_LOAD, 0, 0, _FIRST),  # the process
        (_EQUAL, 1, 0, 0),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("<HBBI", *line) for line in program)


def _refused_with(number: int, argument: int, flags: int) -> list[tuple[int, int, int, int]]:
    """Lines that refuse a call if its argument has any of the flags, and otherwise allow it."""
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, argument),
        (_ANY_BIT, 0, 1, flags),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
