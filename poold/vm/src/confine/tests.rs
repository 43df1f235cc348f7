//! Attempts from inside: this test program runs itself again, confines itself, and tries.

use super::filter::EXIT_FORBIDDEN;
use super::{ConfineArguments, enter};
use nix::errno::Errno;
use std::fs::File;
use std::io::{self, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Name of the attempt, and the directory: set for the program that runs again.
const ATTEMPT: &str = "POOLD_VM_TEST_ATTEMPT";
const DIRECTORY: &str = "POOLD_VM_TEST_DIRECTORY";

/// What an attempt prints when it is refused, and when it is not.
const REFUSED: &str = "attempt: refused";
const DONE: &str = "attempt: done";

const UID: u32 = 0x7000_0001;

/// How the process is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Depth {
    /// As root's daemon does it.
    Jail,
    /// As a daemon without root does it.
    FilterAndLandlock,
}

/// Is the attempt, in the program that runs again; in the first one it does nothing.
#[test]
fn attempt() {
    let (Ok(attempt), Ok(directory)) = (std::env::var(ATTEMPT), std::env::var(DIRECTORY)) else { return };
    let (depth, attempt) = attempt.split_once(' ').expect("how deep, and what");
    let uid = (depth == "Jail").then_some(UID);
    let replica_dir = Some(Path::new(&directory).join("replicas"));
    let dir = Path::new(&directory).join("vm");
    // As a VM process does.
    vmm::host::open_early();
    let views = enter(&dir, &ConfineArguments { uid, replica_dir }).unwrap();
    let result =
        perform(attempt, views.own(), &views.inside(&Path::new(&directory).join("replicas")).unwrap());
    match result {
        Ok(()) => say(DONE),
        Err(error) => say(&format!("{REFUSED} {error}")),
    }
    // Nothing else of the test program runs confined. It ends without the standard library's clean-up, which unmaps the
    // signal stack of the main thread: that one may still be on it, for it took the new user in a signal's handler.
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

fn say(text: &str) {
    // Past the capture of the test program, which is another thread's.
    writeln!(io::stderr(), "{text}").unwrap();
}

fn errno(result: i64) -> io::Result<()> {
    Ok(Errno::result(result).map(drop)?)
}

fn socket(domain: i32, kind: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    errno(unsafe { libc::socket(domain, kind, 0) }.into())
}

fn perform(attempt: &str, own: &Path, replicas: &Path) -> io::Result<()> {
    match attempt {
        "file outside" => File::open("/etc/passwd").map(drop),
        "folder above" => File::open(own.join("../../../../etc/passwd")).map(drop),
        "device" => File::options().read(true).write(true).open("/dev/kvm").map(drop),
        "daemon's file" => std::fs::remove_file(own.join("lock")),
        "image" => File::options().write(true).open(own.join("kernel")).map(drop),
        "replica folder" => File::create(replicas.join("new")).map(drop),
        "exec" => Command::new("/bin/true").status().map(drop),
        // SAFETY: plain numbers, and null pointers that these requests do not use.
        "ptrace" => errno(unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) }),
        // SAFETY: as above.
        "kill" => errno(unsafe { libc::kill(1, 0) }.into()),
        // SAFETY: as above.
        "mount" => errno(unsafe { libc::syscall(libc::SYS_mount, 0, 0, 0, 0, 0) }),
        // SAFETY: as above.
        "uid" => errno(unsafe { libc::syscall(libc::SYS_setuid, 0) }),
        // SAFETY: as above.
        "executable memory" => errno(unsafe {
            libc::syscall(
                libc::SYS_mmap,
                0,
                4096,
                libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        }),
        "netlink" => socket(libc::AF_NETLINK, libc::SOCK_RAW),
        "raw" => socket(libc::AF_INET, libc::SOCK_RAW),
        "packet" => socket(libc::AF_PACKET, libc::SOCK_DGRAM),
        "tcp" => TcpListener::bind(("127.0.0.1", 0)).map(drop),
        "vsock" => socket(libc::AF_VSOCK, libc::SOCK_STREAM),
        "own work" => own_work(own, replicas),
        other => Err(io::Error::other(format!("no attempt {other}"))),
    }
}

/// What a VM process does all the time.
fn own_work(own: &Path, replicas: &Path) -> io::Result<()> {
    UnixStream::connect(replicas.join("replica.sock"))?;
    let _listener = UnixListener::bind(own.join("machine.sock.new"))?;
    std::fs::rename(own.join("machine.sock.new"), own.join("machine.sock"))?;
    let udp = UdpSocket::bind(("127.0.0.1", 0))?;
    udp.send_to(b"hello", udp.local_addr()?)?;
    std::fs::read(own.join("kernel"))?;
    std::thread::spawn(|| ()).join().map_err(|_| io::Error::other("a thread"))?;
    vmm::Memory::new(proto::ByteCount(1 << 20)).map_err(io::Error::other)?;
    Ok(())
}

/// A directory as the daemon prepares it, with a replica server.
struct World {
    root: tempfile::TempDir,
    _server: UnixListener,
}

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| -> PathBuf { root.path().join(name) };
        std::fs::create_dir(path("vm")).unwrap();
        std::fs::create_dir(path("replicas")).unwrap();
        std::fs::write(path("vm/lock"), "1").unwrap();
        std::fs::write(path("vm/kernel"), "kernel").unwrap();
        let read_only = std::os::unix::fs::PermissionsExt::from_mode(0o444);
        std::fs::set_permissions(path("vm/kernel"), read_only).unwrap();
        let server = UnixListener::bind(path("replicas/replica.sock")).unwrap();
        let all = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        std::fs::set_permissions(path("replicas/replica.sock"), all).unwrap();
        Self { root, _server: server }
    }
}

/// Runs an attempt; its exit code and what it said.
fn run(depth: Depth, attempt: &str) -> (Option<i32>, String) {
    let world = World::new();
    let mut program = Command::new(std::env::current_exe().unwrap());
    program.args(["--exact", "confine::tests::attempt", "--nocapture", "--test-threads=1"]);
    program.env(ATTEMPT, format!("{depth:?} {attempt}")).env(DIRECTORY, world.root.path());
    let output = program.output().unwrap();
    // The C library shuts all signals off before it makes a process: then SIGSYS ends this one without the handler.
    let code = output.status.code().or(output.status.signal().map(|signal| 128 + signal));
    (code, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The depths that can be tried here.
fn depths() -> Vec<Depth> {
    let jail = nix::unistd::Uid::effective().is_root().then_some(Depth::Jail);
    jail.into_iter().chain([Depth::FilterAndLandlock]).collect()
}

#[test]
fn what_a_vm_process_needs_is_left_to_it() {
    for depth in depths() {
        let (code, said) = run(depth, "own work");
        assert!(code == Some(0) && said.contains(DONE), "{depth:?}: {code:?} {said}");
    }
}

#[test]
fn files_outside_of_its_directory_are_out_of_reach() {
    for depth in depths() {
        for attempt in ["file outside", "folder above", "device"] {
            let (code, said) = run(depth, attempt);
            assert!(code == Some(0) && said.contains(REFUSED), "{depth:?}, {attempt}: {code:?} {said}");
        }
    }
}

#[test]
fn what_the_daemon_put_into_its_directory_stays_as_it_is() {
    if !nix::unistd::Uid::effective().is_root() {
        // Without a user of its own the process owns the files.
        return;
    }
    for attempt in ["daemon's file", "image", "replica folder"] {
        let (code, said) = run(Depth::Jail, attempt);
        assert!(code == Some(0) && said.contains(REFUSED), "{attempt}: {code:?} {said}");
    }
}

#[test]
fn forbidden_calls_end_it_and_the_log_has_their_numbers() {
    let attempts = [
        ("exec", None),
        ("ptrace", Some(libc::SYS_ptrace)),
        ("kill", Some(libc::SYS_kill)),
        ("mount", Some(libc::SYS_mount)),
        ("uid", Some(libc::SYS_setuid)),
        ("executable memory", Some(libc::SYS_mmap)),
        ("netlink", Some(libc::SYS_socket)),
        ("raw", Some(libc::SYS_socket)),
        ("packet", Some(libc::SYS_socket)),
        ("tcp", Some(libc::SYS_socket)),
        ("vsock", Some(libc::SYS_socket)),
    ];
    for depth in depths() {
        for (attempt, call) in attempts {
            let (code, said) = run(depth, attempt);
            assert_eq!(code, Some(EXIT_FORBIDDEN), "{depth:?}, {attempt}: {said}");
            let line = call.map(|call| format!("made system call {call},"));
            assert!(line.is_none_or(|line| said.contains(&line)), "{depth:?}, {attempt}: {said}");
        }
    }
}
