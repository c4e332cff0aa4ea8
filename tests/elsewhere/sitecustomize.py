"""Another system as a Python program sees it, on Linux: ELSEWHERE=windows or ELSEWHERE=macos.

    ELSEWHERE=windows PYTHONPATH=tests/elsewhere python train.py ...

Python imports this file by itself. The project's own code (all that lies below the working folder, or below
$ELSEWHERE_ROOT) finds no module and no function that the other system lacks; libraries and the standard library, which
have versions of their own there, work as ever. Files in $ELSEWHERE_DATA obey the rules of Windows. It cannot show what
else differs: drive letters, case, line ends, speed.
"""

import builtins
import contextlib
import ctypes
import multiprocessing
import os
import pathlib
import platform
import signal
import sys

SYSTEM = os.environ.get("ELSEWHERE", "")
MISSING = {"windows": ("fcntl", "resource", "pwd", "grp", "termios"), "macos": ()}
SIGNALS = {"windows": ("SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM"), "macos": ()}
FUNCTIONS = {
    "windows": {signal: ("sigwait", "sigwaitinfo", "sigtimedwait", "pthread_sigmask", "pthread_kill", "alarm"),
                os: ("fork", "getuid", "geteuid", "getpgid", "killpg", "setsid", "sched_getaffinity", "mkfifo",
                     "fchmod")},
    "macos": {signal: ("sigwaitinfo", "sigtimedwait"), os: ("sched_getaffinity",)},
}  # fmt: skip


def root() -> str:
    """The folder of the project: the one above tools/ or tests/, or that of the started script."""
    given = os.environ.get("ELSEWHERE_ROOT")
    return os.path.realpath(given) if given else os.path.realpath(os.getcwd())


ROOT = root() + os.sep
FOREIGN = ("site-packages", "dist-packages", os.sep + "lib" + os.sep + "python", "sitecustomize")


def ours(depth: int = 2) -> bool:
    """Whether the caller of the caller belongs to the project."""
    name = os.path.realpath(sys._getframe(depth).f_code.co_filename)
    return name.startswith(ROOT) and not any(word in name[len(ROOT) - 1 :] for word in FOREIGN)


def hide_modules(names: tuple) -> None:
    real = builtins.__import__

    def imported(name, globals=None, locals=None, fromlist=(), level=0):
        if name in names and ours():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, globals, locals, fromlist, level)

    builtins.__import__ = imported


def hide_functions(table: dict, signals: tuple) -> None:
    """Replaces a module by one whose attributes are missing for the project's code."""
    for module, names in table.items():
        hidden = frozenset(name for name in (*names, *(signals if module is signal else ())) if hasattr(module, name))
        real = {name: getattr(module, name) for name in hidden}

        class Module(type(module)):
            _real, _hidden = real, hidden

            def __getattribute__(self, name):
                kind = type(self)
                if name in kind._hidden:
                    if ours():
                        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
                    return kind._real[name]
                return super().__getattribute__(name)

        module.__class__ = Module


def windows_files() -> None:
    """No folder can be opened, and no file replaced or removed that this process has open or mapped."""
    real_open, real_replace, real_unlink = os.open, os.replace, os.unlink

    def opened(path, flags, mode=0o777, *, dir_fd=None):
        if ours() and dir_fd is None and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags, mode, dir_fd=dir_fd)

    def in_use(path) -> bool:
        path = os.path.realpath(os.fspath(path))
        with open("/proc/self/maps") as maps:
            if any(line.rstrip().endswith(path) for line in maps):
                return True
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{descriptor}") == path:
                    return True
            except OSError:
                pass
        return False

    def replace(source, target, **options):
        for path in (source, target):
            if os.path.exists(path) and os.path.realpath(path).startswith(tuple(watched)) and in_use(path):
                raise PermissionError(13, "Access is denied", str(path))
        return real_replace(source, target, **options)

    def unlink(path, *args, **options):
        name = os.fspath(path)
        if isinstance(name, str) and os.path.realpath(name).startswith(tuple(watched)) and in_use(name):
            raise PermissionError(13, "The file is used by another process", name)
        return real_unlink(path, *args, **options)

    given = filter(None, os.environ.get("ELSEWHERE_DATA", "").split(":"))
    watched = [ROOT, *(os.path.realpath(path) + os.sep for path in given)]
    os.open, os.replace, os.unlink, os.remove = opened, replace, unlink, unlink

    def path_unlink(self, missing_ok=False):
        try:
            unlink(self)
        except FileNotFoundError:
            if not missing_ok:
                raise

    pathlib.Path.unlink = path_unlink
    pathlib.Path.replace = lambda self, target: (replace(self, target), type(self)(target))[1]


def other_c_library() -> None:
    """Windows has no C library to open without a name, and macOS has one without Linux's functions."""
    real = ctypes.CDLL

    class Library(real):
        def __init__(self, name, *args, **options):
            if name is None and SYSTEM == "windows" and ours():
                raise TypeError("argument of type 'NoneType' is not iterable")
            super().__init__(name, *args, **options)

        def __getattr__(self, name):
            if name in ("prctl", "mallopt", "malloc_trim") and ours():
                raise AttributeError(f"dlsym(RTLD_DEFAULT, {name}): symbol not found")
            return super().__getattr__(name)

    ctypes.CDLL = Library


if SYSTEM in MISSING:
    hide_modules(MISSING[SYSTEM])
    hide_functions(FUNCTIONS[SYSTEM], SIGNALS[SYSTEM])
    platform.libc_ver = lambda *args, **options: ("", "")
    other_c_library()
    if SYSTEM == "windows":
        windows_files()
    with contextlib.suppress(RuntimeError):
        multiprocessing.set_start_method("spawn")
elif SYSTEM:
    raise SystemExit(f"ELSEWHERE={SYSTEM}: give windows or macos")
