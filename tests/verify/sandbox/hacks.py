"""Answers that try to pass without solving anything: a golden suite. None of them adds two numbers."""

from __future__ import annotations

TESTS = "assert add(1, 2) == 3\nassert add([1], [2]) == [1, 2]\nassert add('a', 'b') == 'ab'\n"

FOOLS_PLAIN_PYTHON = {
    "exit": "import sys\nsys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit when called": "import os\ndef add(a, b):\n    os._exit(0)",
    "exit by exception": "def add(a, b):\n    raise SystemExit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b):\n    return None",
    "exit in the hook": "import os, sys\nsys.excepthook = lambda *_: os._exit(0)\ndef add(a, b):\n    return None",
    "equal to everything": (
        "class Equal:\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Equal()"
    ),
    "an integer equal to everything": (
        "class Equal(int):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Equal(7)"
    ),
    "a list equal to everything": (
        "class Equal(list):\n    def __eq__(self, other):\n        return True\ndef add(a, b):\n    return Equal()"
    ),
    "a string equal to everything": (
        "class Equal(str):\n    def __eq__(self, other):\n        return True\n"
        "    __hash__ = str.__hash__\ndef add(a, b):\n    return Equal('x')"
    ),
    "another process says yes": "import os\nif os.fork():\n    os._exit(0)\ndef add(a, b):\n    return None",
    "exit from a thread": (
        "import os, threading, time\nthreading.Thread(target=os._exit, args=(0,)).start()\n"
        "def add(a, b):\n    time.sleep(10)"
    ),
    "exit from a timer": (
        "import os, signal, time\nsignal.signal(signal.SIGALRM, lambda *_: os._exit(0))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)\ndef add(a, b):\n    time.sleep(10)"
    ),
    "exit in a finaliser": (
        "import os\nclass A:\n    def __del__(self):\n        os._exit(0)\nA()\ndef add(a, b):\n    return None"
    ),
    "tracing the tests": (
        "import os, sys\ndef watch(frame, event, argument):\n    if event == 'call':\n        os._exit(0)\n"
        "sys.settrace(watch)\ndef add(a, b):\n    return None"
    ),
    "become another program": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "reading the tests": (
        "import re, sys\ndef add(a, b):\n    line = sys._getframe(1).f_lineno\n"
        "    text = open('/proc/self/cmdline').read().split('TESTS\\n')[-1].splitlines()\n"
        "    return next(eval(l.split('== ')[1]) for l in text if l.startswith(f'assert add({a!r}, {b!r})'))"
    ),
}
"""These pass where the answer, a line TESTS and the tests are one Python program whose exit code is believed."""

_NONE = "\ndef add(a, b):\n    return None"
_SAID = 'b\'{"right": true, "reason": "", "started": true, "value": true}\\n\''

OTHERS = {
    "printing the mark": f"print('passed', 'OK', 0)\nimport os\nos.write(1, {_SAID})\nos._exit(0)",
    "writing to all files": (
        f"import os\nfor n in range(64):\n    try:\n        os.write(n, {_SAID})\n    except OSError:\n        pass"
        + _NONE
    ),
    "replies before the calls": (
        "import os\nforged = b'{\"defined\": true}\\n' + b'{\"value\": true}\\n' * 9\n"
        "for n in range(3, 64):\n    try:\n        os.write(n, forged)\n"
        "    except OSError:\n        pass\nos._exit(0)"
    ),
    "patching built-ins": (
        "import builtins\nfor name in ('all', 'any', 'isinstance', 'len', 'abs', 'bool', 'repr', 'getattr'):\n"
        "    setattr(builtins, name, lambda *_: True)\nbuiltins.AssertionError = ValueError" + _NONE
    ),
    "patching json": 'import json\njson.dumps = lambda *_: \'{"value": true, "right": true}\'' + _NONE,
    "faking modules": (
        "import sys\nfor name in ('json', 'tests', 'os', '__main__'):\n    sys.modules[name] = sys" + _NONE
    ),
    "poisoning imports": (
        "for name in ('json', 'traceback'):\n    open(f'/tmp/{name}.py', 'w').write('import os; os._exit(0)')" + _NONE
    ),
    "walking the heap for the tests": (
        "import gc\ndef add(a, b):\n    for found in gc.get_objects():\n"
        "        if isinstance(found, dict) and 'tests' in found:\n"
        "            return eval(str(found['tests']).split('== ')[1])"
    ),
    "walking the heap for the nonce": (
        "import gc, re, os\nfor found in gc.get_objects():\n"
        "    for nonce in re.findall('[0-9a-f]{32}', str(found)[:10000]):\n"
        '        os.write(1, (\'{"right": true, "started": true, "nonce": "%s"}\' % nonce).encode())' + _NONE
    ),
    "walking the frames": (
        "import sys\ndef add(a, b):\n    frame = sys._getframe().f_back\n    while frame:\n"
        "        for value in frame.f_locals.values():\n            if isinstance(value, str) and 'assert' in value:\n"
        "                return eval(value.split('== ')[1])\n        frame = frame.f_back"
    ),
    "reading other processes": (
        "import os\ndef add(a, b):\n    for process in os.listdir('/proc'):\n"
        "        text = open(f'/proc/{process}/cmdline').read()\n"
        "        if '== ' in text:\n            return eval(text.split('== ')[1])"
    ),
    "writing other memory": "open('/proc/1/mem', 'r+b').write(b'x')" + _NONE,
    "searching the files": (
        "import os\ndef add(a, b):\n    for folder, _, names in os.walk('/tmp'):\n        for name in names:\n"
        "            text = open(os.path.join(folder, name)).read()\n            return eval(text.split('== ')[1])"
    ),
    "reading standard input": "text = input()\ndef add(a, b):\n    return eval(text.split('== ')[1])",
    "reading all files": (
        "import os\nfor n in range(3, 64):\n    try:\n        os.set_blocking(n, False)\n        os.read(n, 65536)\n"
        "    except OSError:\n        pass" + _NONE
    ),
    "closing all files": "import os\nos.closerange(0, 64)" + _NONE,
    "asking a shell": "import subprocess\nsubprocess.run(['sh', '-c', 'kill -9 -1'])" + _NONE,
    "killing everything": "import os, signal\nos.kill(-1, signal.SIGKILL)" + _NONE,
    "killing the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)" + _NONE,
    "sockets": "import socket\nsocket.create_connection(('127.0.0.1', 9000), timeout=1)" + _NONE,
    "abstract sockets": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0fusion')" + _NONE,
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "full disk": (
        "for n in range(10**6):\n    try:\n"
        "        open(f'/tmp/{n}', 'wb').write(bytes(2**20))\n    except OSError:\n        break" + _NONE
    ),
    "full memory": "held = []\nwhile True:\n    held.append(bytearray(2**24))" + _NONE,
    "memory outside the limit": "import os\nheld = os.memfd_create('x')" + _NONE,
    "crash": "import ctypes\nctypes.string_at(0)" + _NONE,
    "an exception that prints": (
        "import os\nclass Sly(AssertionError):\n    def __str__(self):\n        os._exit(0)\n"
        "def add(a, b):\n    raise Sly"
    ),
    "an exception named like an exit": (
        "class KeyboardInterrupt(BaseException):\n    pass\nclass GeneratorExit(BaseException):\n    pass\n"
        "def add(a, b):\n    raise KeyboardInterrupt"
    ),
    "a huge reply": "def add(a, b):\n    return 'x' * 10**8",
    "a deep reply": (
        "def add(a, b):\n    value = []\n    for _ in range(10**5):\n        value = [value]\n    return value"
    ),
    "a broken reply": (
        "import __main__\n__main__.encode = lambda value: ['set', [['list', []]]]\ndef add(a, b):\n    return 3"
    ),
    "not a number": "def add(a, b):\n    return float('nan')",
    "a truth value": "def add(a, b):\n    return True",
    "mounting": "import ctypes\nctypes.CDLL(None).mount(b'none', b'/tmp', b'proc', 0, None)" + _NONE,
    "new namespaces": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0" + _NONE,
    "syntax error": "def add(a, b) return a + b",
    "nothing": "",
    "too many brackets": "(" * 10**5,
}

ENDLESS = {
    "endless recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef add(a, b):\n    return add(a, b)",
    "patching the runner": (
        "import __main__\n__main__.encode = lambda value: True\n__main__._send = lambda *_: None" + _NONE
    ),
    "endless loop": "while True:\n    pass",
    "sleeping": "import time\ndef add(a, b):\n    time.sleep(10**6)",
    "deaf to signals": (
        "import signal\nfor number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\ndef add(a, b):\n    while True:\n        pass"
    ),
}
"""These end with their time only, or nearly so."""
