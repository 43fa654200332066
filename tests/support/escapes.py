"""What untrusted code may try, and a sandbox has to refuse."""

import os

# Each prints "did it" where it succeeds. `secret` is a file of the grader's, `parent` the grader's process id,
# `descriptor` an inheritable one of its own open files.
DIRECT = {
    "read_outside": "open(secret).read()",
    "read_through_symlink": "os.symlink(secret, 'link'); open('link').read()",
    "read_through_hard_link": "os.link(secret, 'link'); open('link').read()",
    "read_through_dots": "open(os.path.relpath(secret)).read()",
    "list_outside": "os.listdir(os.path.dirname(secret))",
    "write_outside": "open(secret + '.new', 'w').write('x')",
    "append_outside": "open(secret, 'a').write('x')",
    "empty_outside": "os.truncate(secret, 0)",
    "delete_outside": "os.remove(secret)",
    "move_outside": "os.rename(secret, secret + '.moved')",
    "change_mode_outside": "os.chmod(secret, 0o644)",
    "change_time_outside": "os.utime(secret, (1, 1))",
    "make_folder_outside": "os.mkdir(secret + '.folder')",
    "read_environment_of_parent": "open(f'/proc/{parent}/environ').read()",
    "read_files_of_parent": "open(f'/proc/{parent}/fd/{descriptor}').read()",
    "read_memory_of_parent": "open(f'/proc/{parent}/mem', 'rb')",
    "read_arguments_of_processes": "open('/proc/self/cmdline').read()",
    "read_inherited_file": "os.fstat(descriptor)",
    "internet_socket": "socket.socket()",
    "unix_socket": "socket.socket(socket.AF_UNIX)",
    "socket_pair": "socket.socketpair()",
    "fork": "os.fork() or os._exit(0)",
    "program": "subprocess.run([sys.executable, '-V'], check=True, stdout=subprocess.DEVNULL)",
    "spawn": "os.waitpid(os.posix_spawn(sys.executable, ['python', '-c', ''], {}), 0)",
    "thread": "threading.Thread(target=int).start()",
    "replace_itself": "sys.stdout.flush(); os.execv('/bin/echo', ['echo', 'did it'])",
    "signal_parent": "os.kill(parent, 0)",
    # The kernel signals whoever "owns" a pipe when it becomes readable: F_SETOWN, F_SETSIG, O_ASYNC.
    "signal_parent_through_pipe": "fcntl.fcntl(1, 8, parent)",
    "more_memory": "resource.setrlimit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS))",
    "other_group": "os.setpgid(0, 0)",
    "trace": "assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0",
    "memory_file": "os.memfd_create('x')",
    "named_pipe": "os.mkfifo('pipe')",
    "folder": "os.mkdir('folder')",
    "clone": "pid = ctypes.CDLL(None).syscall(CLONE, 17, 0, 0, 0, 0); assert pid >= 0; pid or os._exit(0)",
    "environment": "assert set(os.environ) - {'LC_CTYPE'}",
}
CLONE = 56 if os.uname().machine == "x86_64" else 220
PREAMBLE = f"import ctypes, fcntl, os, resource, socket, subprocess, sys, threading\nCLONE = {CLONE}\n"
