"""MindSpore's semi-auto parallel on CPU processes, run or simulated: for tests and plans.

MindSpore's CPU back end can start and group processes (`msrun`, MCCL), but its parallel front end refuses the CPU by
name and most communication operators have no CPU kernel. Three small C++ libraries beside this file close that gap.
They are built with g++ against the headers that MindSpore's wheel carries, when they are first needed, and kept in the
user's cache, one set for each MindSpore version. A real cluster needs none of this.

    build.preload_environment()       what a process must be started with
    groups.install()                  in such a process under msrun: parallel runs over real processes
    groups.simulate(rank, size)       in such a process: compile any rank of any cluster, front end only
    simulated.run_rank(module, job)   starts a program as such a rank

Messages between ranks are files in a folder of their job's own, in CPU_PARALLEL_MAILBOX: a folder that all ranks see
and in which files can be locked; unless it is set, /dev/shm or where temporary files go. Jobs may share a mailbox. What
a killed job left there disturbs none, and the next one removes it; a job that ends removes its own. A rank that waits
for another raises within seconds when that one has died or ended, and names it; when it lives, after
CPU_PARALLEL_TIMEOUT_S (300).
"""
