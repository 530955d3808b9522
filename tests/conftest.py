"""One thread for each test process: several are at work at once, and spinning threads would take their time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported, and by the commands that tests start
