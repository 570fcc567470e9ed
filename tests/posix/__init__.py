"""A POSIX conformance suite: functions that take an empty directory of the file system.

``CASES`` holds them all.  They run natively (test_native.py), on mounts of the filer and inside
the guest (tests/e2e), and on any directory by hand: ``python -m tests.posix /mnt/point``.
"""
