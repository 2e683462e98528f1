#!/usr/bin/env bash
# paddle.io.DataLoader without workers waits for ever after an error in its data set or in making a batch.
#
# With num_workers=0 a thread of the loader reads. It prints the traceback of what goes wrong, here of two samples of
# different shapes, and ends; the loop over the loader waits for the next batch and nothing ends it, not even Ctrl-C.
# With num_workers=2 the loop gets a SystemError.
#
# Needs Python 3.11, 2 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet paddlepaddle==3.3.1 numpy==1.26.4 setuptools==80.9.0
cat > program.py <<'PROGRAM'
import subprocess
import sys

LOOP = """
import sys
import numpy as np
import paddle

class Samples(paddle.io.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        return np.zeros([3 if number == 5 else 2], "float32")

for batch in paddle.io.DataLoader(Samples(), batch_size=4, num_workers=int(sys.argv[1]), places=paddle.CPUPlace()):
    pass
"""
endings = []
for workers in ("0", "2"):
    command = [sys.executable, "-W", "ignore", "-c", LOOP, workers]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        endings.append("SystemError" if "SystemError" in done.stderr else f"exit code {done.returncode}")
    except subprocess.TimeoutExpired:
        endings.append("it still waits after 60 s")
print("expected: the error, with any number of workers")
for workers, ending in zip("02", endings):
    print(f"{workers} workers: {ending}")
as_described = endings == ["it still waits after 60 s", "SystemError"]
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64, paddlepaddle 3.3.1):
#   expected: the error, with any number of workers
#   0 workers: it still waits after 60 s
#   2 workers: SystemError
#   as described
