//! `cargo xtask boot`: Debian's kernel under armlet, from nothing to a shell prompt.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use argh::FromArgs;

use crate::assets::{self, Choice};
use crate::host::{self, Ended, HostFile, HostSpec, Job};
use crate::isa::Isa;
use crate::marker::Filter;
use crate::packages::Store;
use crate::progress::say;
use crate::rig;
use crate::small_std;
use crate::terminal::RawTerminal;

/// What the emulated host needs besides the guest's memory: itself and the files put in.
const HOST_MEMORY_MIB: u32 = 1536;

/// How long a script may take, emulated CPUs included.
const SCRIPT_LIMIT: Duration = Duration::from_secs(900);

/// Boot Debian's kernel under armlet to a shell prompt.
///
/// Runs armlet itself on a machine of the guest's architecture with KVM, and elsewhere inside an emulated one. Fetches
/// what is missing into the cache folder first. In the shell, Ctrl-A x leaves armlet and, where
/// the host is emulated, Ctrl-] stops it at once.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "boot")]
pub(crate) struct Boot {
    /// the guest's architecture: aarch64 (the default) or x86_64
    #[argh(option, default = "String::from(\"aarch64\")")]
    arch: String,

    /// run these shell commands in the guest, print what they print and exit with their status
    #[argh(option)]
    script: Option<String>,

    /// how many CPUs the guest has (default 1)
    #[argh(option, default = "1")]
    cpus: u32,

    /// the guest's memory, such as 512M (the default) or 2G
    #[argh(option, default = "String::from(\"512M\")")]
    memory: String,

    /// build armlet with optimisation
    #[argh(switch)]
    release: bool,

    /// more for the guest's kernel command line
    #[argh(option, default = "String::new()")]
    cmdline: String,

    /// further arguments of `armlet run`, after `--`
    #[argh(positional, greedy)]
    armlet: Vec<String>,
}

impl Boot {
    /// Boots the guest and gives the exit status of its script, or of armlet.
    pub(crate) fn run(&self) -> Result<i32> {
        let memory_mib = host::mebibytes(&self.memory).context("--memory")?;
        let terminal_wanted = self.script.is_none();
        let store = Store::open()?;
        let isa = Isa::from_name(&self.arch)?;
        let armlet = build(isa, "armlet", self.release)?;
        let folder = assets::prepare(&store, isa, Choice::Standard)?;
        let image = assets::kernel(isa);
        let initrd = self.initrd(&folder)?;

        say(&format!(
            "guest: Debian's Linux {}",
            store.kernel(assets::standard(isa))?.version()
        ));
        if terminal_wanted {
            say("leave armlet with Ctrl-A x; stop an emulated host at once with Ctrl-]");
        }
        if isa.is_native() {
            return self.run_natively(isa, &armlet, &folder, &initrd.path());
        }
        let spec = HostSpec {
            memory_mib: (memory_mib + HOST_MEMORY_MIB).max(HostSpec::of(isa).memory_mib),
            ..HostSpec::from_variables(isa)?
        };
        let in_host = PathBuf::from(assets::FOLDER_IN_HOST);
        let file = |from: &Path, to: PathBuf, mode| HostFile {
            from: from.to_owned(),
            to,
            mode,
        };
        let program = "/bin/armlet";
        let job = Job {
            files: vec![
                file(&armlet, program.into(), 0o755),
                file(&folder.join(image), in_host.join(image), 0o644),
                file(&initrd.path(), in_host.join("initrd"), 0o644),
            ],
            command: self.command(isa, program, &in_host.join(image), &in_host.join("initrd")),
            environment: Vec::new(),
            folder: "/root".into(),
            limit: self.script.is_some().then_some(SCRIPT_LIMIT),
            ..Job::default()
        };

        let mut output = Output::new(self.script.is_some());
        let mut print = |bytes: &[u8]| output.print(bytes);
        let terminal = if terminal_wanted {
            RawTerminal::take()?
        } else {
            None
        };
        let ended = rig::run(&store, &spec, &job, terminal.as_ref(), &mut print)?;
        drop(terminal);
        match ended {
            Ended::Left => {
                say("stopped the emulated host");
                Ok(0)
            }
            Ended::Signal(signal) => Ok(128 + signal),
            Ended::Exit(status) => output.status(status),
        }
    }

    /// Returns the guest's initramfs, with the script added to it if there is one.
    fn initrd(&self, folder: &Path) -> Result<host::NamelessFile> {
        let standard = folder.join("initrd");
        let mut data =
            std::fs::read(&standard).with_context(|| format!("cannot read {standard:?}"))?;
        if let Some(script) = &self.script {
            data.extend(assets::script(script)?);
        }
        let file = host::NamelessFile::new()?;
        file.file()
            .write_all(&data)
            .context("cannot write the guest's initramfs")?;
        Ok(file)
    }

    fn command(&self, isa: Isa, armlet: &str, image: &Path, initrd: &Path) -> Vec<String> {
        let run = if self.script.is_some() {
            "script"
        } else {
            "shell"
        };
        let cmdline = format!(
            "console={} quiet cryptomgr.notests armlet.run={run} {}",
            isa.console(),
            self.cmdline
        );
        let mut command = vec![armlet.to_owned(), "run".to_owned()];
        let options = [
            ("--kernel", image.to_string_lossy().into_owned()),
            ("--initrd", initrd.to_string_lossy().into_owned()),
            ("--cmdline", cmdline.trim_end().to_owned()),
            ("--cpus", self.cpus.to_string()),
            ("--memory", self.memory.clone()),
        ];
        for (option, value) in options {
            command.extend([option.to_owned(), value]);
        }
        command.extend(self.armlet.iter().filter(|word| *word != "--").cloned());
        command
    }

    fn run_natively(&self, isa: Isa, armlet: &Path, folder: &Path, initrd: &Path) -> Result<i32> {
        let kernel = folder.join(assets::kernel(isa));
        let words = self.command(isa, &armlet.to_string_lossy(), &kernel, initrd);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        if self.script.is_none() {
            let status = command.status().context("cannot run armlet")?;
            return Ok(status.code().unwrap_or(1));
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run armlet")?;
        let mut console = child.stdout.take().context("armlet has no output")?;
        let mut output = Output::new(true);
        let mut buffer = [0; 4096];
        loop {
            let length = console
                .read(&mut buffer)
                .context("cannot read armlet's output")?;
            if length == 0 {
                break;
            }
            output.print(&buffer[..length])?;
        }
        let status = child.wait().context("cannot wait for armlet")?;
        output.status(status.code().unwrap_or(1))
    }
}

/// Builds a program of ours, which is its package's name too, and gives its path.
pub(crate) fn build(isa: Isa, program: &str, release: bool) -> Result<PathBuf> {
    build_with(isa, program, release, &[])
}

/// Does so with more flags for the compiler, which only the active one takes.
pub(crate) fn build_with(
    isa: Isa,
    program: &str,
    release: bool,
    flags: &[String],
) -> Result<PathBuf> {
    let toolchain = isa.toolchain()?;
    say(&format!("building {program} for {}", toolchain.target));
    let started = Instant::now();
    let mut cargo = crate::repository::cargo();
    cargo.args(["build", "--package", program, "--bin", program]);
    cargo.args(["--target", &toolchain.target]);
    cargo.args(&toolchain.args).envs(toolchain.env.clone());
    if release {
        cargo.arg("--release");
        // Armlet's library needs it, and build scripts run anew, with all that depends on them, where it
        // is set now and then.
        if toolchain.is_active() {
            cargo.env("RUSTC_BOOTSTRAP", "1");
        }
        // Debian's compiler has a library that was compiled so already.
        let shipped = program == "armlet" && toolchain.is_active();
        let (sources, target) = (
            crate::repository::repository(),
            crate::repository::target_folder()?,
        );
        let added = shipped.then(|| small_std::add(&mut cargo, &sources, &target, flags));
        if let Some(Err(error)) = added {
            say(&format!(
                "the standard library as it comes makes {program} larger by a tenth: {error:#}"
            ));
        }
    }
    let status = cargo.status().context("cannot run cargo")?;
    ensure!(status.success(), "{program} does not build");
    say(&format!(
        "built in {:.1} s",
        started.elapsed().as_secs_f32()
    ));

    let profile = if release { "release" } else { "debug" };
    let built = crate::repository::target_folder()?
        .join(&toolchain.target)
        .join(profile)
        .join(program);
    ensure!(built.is_file(), "cargo built no {built:?}");
    Ok(built)
}

/// Standard output: all of the guest's console, or what its script prints.
struct Output {
    script: Option<Filter>,
    /// What came before the script, to be shown when it never starts.
    unread: Vec<u8>,
}

impl Output {
    fn new(script: bool) -> Self {
        Self {
            script: script.then(|| Filter::new("SCRIPT")),
            unread: Vec::new(),
        }
    }

    fn print(&mut self, bytes: &[u8]) -> Result<()> {
        let mut out = std::io::stdout();
        let written = match &mut self.script {
            Some(filter) => out.write_all(&filter.feed(bytes)),
            None => out.write_all(bytes),
        };
        if self.script.as_ref().is_some_and(|filter| !filter.started()) {
            self.unread.extend_from_slice(bytes);
        }
        written
            .and_then(|()| out.flush())
            .context("cannot write standard output")
    }

    /// Returns the status to exit with, when armlet ended with `armlet`.
    fn status(&self, armlet: i32) -> Result<i32> {
        let Some(filter) = &self.script else {
            return Ok(armlet);
        };
        match filter.status() {
            Some(0) => Ok(armlet),
            Some(status) => Ok(status),
            None => bail!(
                "the script did not end: armlet exited with {armlet}; the console said\n{}",
                String::from_utf8_lossy(&self.unread)
            ),
        }
    }
}
