#!/usr/bin/env bash
# The workers of paddle.io.DataLoader stay for ever when the process that started them is killed.
#
# A worker is meant to look every 5 seconds whether its parent is alive. It asks its queue for work with
# `indices_queue.get(MP_STATUS_CHECK_INTERVAL)`, where the first argument is `block` and not `timeout`, and waits for
# ever. Each worker holds the others' pipes open, and whatever else it inherited: memory, ports, locks of files (flock).
#
# Needs Linux, Python 3.11, 2 GB in a temporary folder. Exit 0: as described; 1: it changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet paddlepaddle==3.3.1 numpy==1.26.4 setuptools==80.9.0
cat > program.py <<'PROGRAM'
import os
import signal
import subprocess
import sys
import time

TRAINING = """
import os
import signal
import time
import numpy as np
import paddle

class Samples(paddle.io.Dataset):
    def __len__(self):
        return 100

    def __getitem__(self, number):
        return np.zeros([2], "float32")

for batch in paddle.io.DataLoader(Samples(), batch_size=1, num_workers=2, places=paddle.CPUPlace()):
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def workers_of(session):
    """Return the processes of a session that still run."""
    found = []
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/stat") as file:
                state, _, _, of_session = file.read().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of_session) == session and state != "Z":
            found.append(int(number))
    return found


training = subprocess.Popen([sys.executable, "-W", "ignore", "-c", TRAINING], start_new_session=True)
training.wait()
time.sleep(60)
left = workers_of(training.pid)
for worker in left:
    os.kill(worker, signal.SIGKILL)
print("expected: no worker a minute after the training was killed")
print(f"workers that run: {len(left)}")
as_described = len(left) == 2
print("as described" if as_described else "changed")
sys.exit(not as_described)
PROGRAM
venv/bin/python -W ignore program.py

# Seen (2026-11, x86-64, paddlepaddle 3.3.1):
#   expected: no worker a minute after the training was killed
#   workers that run: 2
#   as described
