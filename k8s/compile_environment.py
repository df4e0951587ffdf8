"""Compile all Python files below the given folders to byte code that holds whatever the files' times are.

Copying a layer may change a file's time, so the byte code is checked against nothing. Files that are no Python of this
version (templates, code for other versions) are left as they are; a folder of which nothing compiles is an error.
"""

import compileall
import pathlib
import py_compile
import sys

for folder in sys.argv[1:]:
    compileall.compile_dir(
        folder, quiet=2, workers=0, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH, maxlevels=30
    )
    if not any(pathlib.Path(folder).rglob("__pycache__/*.pyc")):
        sys.exit(f"{folder}: nothing was compiled")
