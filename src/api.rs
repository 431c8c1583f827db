//! `armlet api`: Firecracker's control interface, for programs that drive microVMs by it
//! (`docs/api.md`).
//!
//! Before a machine runs, the main thread answers requests, which configure it (`files` opens what
//! they name). When it is to start, `machine` makes of that what `armlet run` makes of its options,
//! and the thread `fc_api` goes on with the connections (`running`): it is confined, sees requests
//! only, and sends commands to the event loop. Crate `armlet-api` has the interface itself.

mod files;
mod limits;
mod log_file;
mod machine;
mod metrics;
mod running;

use crate::cli::ApiArgs;
use crate::kvm::HostArch;
use crate::run::{self, Begin, Commands};
use anyhow::{Context, Result, anyhow, bail};
use armlet_api::http::{Answer, Request};
use armlet_api::microvm::Identity;
use armlet_api::model::{Level, Logger, Metrics};
use armlet_api::route::{Call, Routed};
use armlet_api::server::{Handler, Pending};
use armlet_api::{Microvm, Resources, Server, Step, config_file};
use armlet_arch::{Arch, Architecture};
use armlet_system::messages::{self, Form};
use armlet_system::status::{Fault, Status, status_of};
use files::Files;
use running::{Running, UnderWay};
use std::cell::RefCell;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// The name under which this program is Firecracker to those who start it.
pub const FIRECRACKER: &str = "firecracker";
/// The release whose interface this is.
pub const VERSION: &str = "1.16.1";
/// What a microVM is called if nothing else is said.
const ID: &str = "anonymous-instance";
/// The most bytes of an ID, and of requests and metadata where nothing else is said.
const ID_BYTES: usize = 64;
const BODY_BYTES: usize = 51200;
/// Where clients find the socket if nothing else is said.
const SOCKET: &str = "/run/firecracker.socket";
/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 256 << 10;
/// How long an end waits for the answer to the request that started the machine, or to another.
const FAREWELL: Duration = Duration::from_secs(2);
/// The most bytes of files with configuration or metadata.
const FILE_BYTES: u64 = 1 << 20;

/// What answers before a machine runs.
struct Configuring {
    microvm: Microvm,
    files: Files,
}

impl Handler for Configuring {
    fn handle(&mut self, request: &Request) -> Step {
        self.files.metrics.count(request);
        self.microvm.handle(request, &mut self.files)
    }
}

/// How the start of a machine went, told by the thread that has it to the one that answers for it, which
/// tells when it has.
struct Verdict {
    outcome: Receiver<Result<(), String>>,
    answered: SyncSender<()>,
}

/// The interface, from the start of a machine on.
struct Serving {
    server: Server,
    pending: Option<(Pending, Verdict)>,
    microvm: Microvm,
    files: Files,
    /// What is wrong if the machine does not start.
    what: &'static str,
    under_way: UnderWay,
}

/// Serves requests, until the machine that they configure and start has ended. What it says goes to
/// standard output, in the words that clients look for there, until a log's path is given.
///
/// # Errors
/// Arguments, files and sockets that cannot be used, with a line that says why.
pub fn api(args: &ApiArgs) -> Result<Status> {
    messages::use_output(Form {
        id: args.id.as_deref().unwrap_or(ID).to_owned(),
        show_level: None,
    });
    log::set_max_level(log::LevelFilter::Info);
    let outcome = serve(args);
    match &outcome {
        Ok(Status::Success | Status::GuestReset | Status::GuestFailed) => {
            log::info!("Vmm is stopping.");
            log::info!("Firecracker exiting successfully. exit_code=0");
        }
        // A signal ends it without a word.
        Ok(Status::Stopped) => {}
        Ok(status) => tell_failure(*status),
        Err(error) => {
            log::error!("{error:#}");
            tell_failure(status_of(error));
        }
    }
    outcome
}

fn tell_failure(status: Status) {
    let code = exit_code(status);
    log::error!("Firecracker exiting with error. exit_code={code}");
}

fn serve(args: &ApiArgs) -> Result<Status> {
    let configured = configured(args).fault(Status::Usage);
    let (mut configuring, is_whole) = configured?;
    let mut server = match args.no_api {
        true if is_whole => Server::new(None, 0)?,
        true => return Err(anyhow!("--no-api needs --config-file")).fault(Status::Usage),
        false => listen(args).fault(Status::Failure)?,
    };
    let mut starts = is_whole;
    loop {
        let (tell, outcome) = sync_channel(1);
        let (answered, done) = sync_channel(1);
        let pending = match std::mem::take(&mut starts) {
            true => None,
            false => {
                let verdict = Verdict { outcome, answered };
                let pending = server.serve(&mut configuring)?;
                if pending.is_end {
                    return Err(anyhow!("the snapshot cannot be loaded"));
                }
                Some((pending, verdict))
            }
        };
        let Configuring { microvm, mut files } = configuring;
        files.leave_socket();
        let restore = files.restore.take();
        let (what, is_load) = match &restore {
            None => ("Start microvm error", false),
            Some(_) => ("Load snapshot error", true),
        };
        let options = machine::options(args, &microvm, &files, restore);
        let metrics = files.metrics.clone();
        let under_way = UnderWay::default();
        let serving = Serving {
            server,
            pending,
            microvm,
            files,
            what,
            under_way: under_way.clone(),
        };
        // `run` takes it once nothing but the machine itself can fail.
        let slot = Rc::new(RefCell::new(Some(serving)));
        let outcome = options.and_then(|mut options| {
            let slot = Rc::clone(&slot);
            options.service = Some(Box::new(move |begin, commands| {
                slot.borrow_mut()
                    .take()
                    .map_or(Ok(()), |serving| serving.go_on(begin, commands))
            }));
            run::run(options)
        });
        let left = slot.borrow_mut().take();
        let Some(mut serving) = left else {
            let started = outcome.as_ref().map(drop);
            // Neither waits for the other: there is room for one, and the answer is on its way.
            let _ = tell.try_send(started.map_err(|error| format!("{error:#}")));
            let _ = done.recv_timeout(FAREWELL);
            under_way.wait(FAREWELL);
            metrics.end();
            return outcome;
        };
        let error = match outcome {
            Err(error) => error,
            Ok(status) => return Ok(status),
        };
        let Some((waits, _)) = serving.pending.take() else {
            // A machine that a file describes starts, or this ends.
            return Err(error);
        };
        let why = format!("{what}: {error:#}");
        log::error!("{why}");
        serving.server.answer(&waits, &Answer::fault(why));
        if is_load {
            return Err(error);
        }
        if let Some(vsock) = &serving.microvm.vsock {
            serving.files.take_socket_back(vsock);
        }
        server = serving.server;
        configuring = Configuring {
            microvm: serving.microvm,
            files: serving.files,
        };
    }
}

impl Serving {
    /// Goes on on a thread of its own, beside the machine.
    fn go_on(self, begin: Begin, commands: Commands) -> Result<()> {
        let serve = move || {
            if let Err(error) = begin().and_then(|()| self.serve(commands)) {
                log::error!("the API is served no more: {error:#}");
            }
        };
        let builder = std::thread::Builder::new().name("fc_api".to_owned());
        let started = builder.stack_size(STACK_BYTES).spawn(serve);
        started.context("cannot start the thread fc_api")?;
        Ok(())
    }

    fn serve(mut self, commands: Commands) -> Result<()> {
        let mut running = Running::new(self.microvm, self.files, commands, self.under_way);
        // The first answer of the event loop says that the guest runs. One that has ended already may have
        // run all the same.
        let started = running.wait_for_start();
        if let Some((pending, verdict)) = self.pending.take() {
            let started =
                started.or_else(|why| verdict.outcome.recv_timeout(FAREWELL).unwrap_or(Err(why)));
            let answer = match started {
                Ok(()) => Answer::done(),
                Err(why) => Answer::fault(format!("{}: {why}", self.what)),
            };
            self.server.answer(&pending, &answer);
            // Nobody waits for it while the guest runs.
            let _ = verdict.answered.try_send(());
        }
        loop {
            let pending = self.server.serve(&mut running)?;
            let again = "The microVM was started already.";
            self.server.answer(&pending, &Answer::fault(again));
        }
    }
}

/// What arguments and the file that they name say of a microVM, and whether that is all of it.
fn configured(args: &ApiArgs) -> Result<(Configuring, bool)> {
    let id = args.id.as_deref().unwrap_or(ID);
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if id.is_empty() || id.len() > ID_BYTES || !id.bytes().all(is_word) {
        bail!("--id '{id}' is not 1 to {ID_BYTES} letters, digits and '-'");
    }
    let body = number(
        "--http-api-max-payload-size",
        args.http_api_max_payload_size.as_deref(),
    )?;
    let mmds = number("--mmds-size-limit", args.mmds_size_limit.as_deref())?;
    for (option, text) in [
        ("--start-time-us", &args.start_time_us),
        ("--start-time-cpu-us", &args.start_time_cpu_us),
        ("--parent-cpu-time-us", &args.parent_cpu_time_us),
    ] {
        number(option, text.as_deref())?;
    }
    let identity = Identity {
        id: id.to_owned(),
        version: VERSION,
        is_x86: HostArch::ARCHITECTURE == Architecture::X86_64,
    };
    let mut files = Files::new(id);
    let mut microvm = Microvm::new(identity, mmds.or(body).unwrap_or(BODY_BYTES));
    let level = match args.level.as_deref().map(|text| (text, Level::parse(text))) {
        Some((text, None)) => {
            bail!("--level '{text}' is none; use Error, Warn, Info, Debug or Off")
        }
        Some((_, level)) => level,
        None => None,
    };
    let logger = Logger {
        log_path: args.log_path.clone().map(Into::into),
        level,
        show_level: args.show_level.then_some(true),
        show_log_origin: args.show_log_origin.then_some(true),
        module: args.module.clone(),
    };
    if logger != Logger::default() {
        let done = files.configure_logger(&logger);
        done.map_err(anyhow::Error::msg).context("--log-path")?;
    }
    log::info!("Running Firecracker v{VERSION}");
    if let Some(path) = &args.metrics_path {
        let calls = vec![Call::PutMetrics(Metrics {
            metrics_path: path.into(),
            emit_id: false,
            properties: Default::default(),
        })];
        carry_out(calls, &mut microvm, &mut files).context("--metrics-path")?;
    }
    if let Some(path) = &args.metadata {
        let what = || format!("--metadata '{path}'");
        let data = serde_json::from_slice(text_of(path).with_context(what)?.as_bytes());
        let calls = vec![Call::PutMmds(data.with_context(what)?)];
        carry_out(calls, &mut microvm, &mut files).with_context(what)?;
    }
    let is_whole = args.config_file.is_some();
    if let Some(path) = &args.config_file {
        let what = || format!("--config-file '{path}'");
        let text = text_of(path).with_context(what)?;
        let cpu = |path: &str| text_of(path).map_err(|error| format!("{error:#}"));
        let calls = config_file::read(&text, cpu).map_err(anyhow::Error::msg);
        carry_out(calls.with_context(what)?, &mut microvm, &mut files).with_context(what)?;
    }
    Ok((Configuring { microvm, files }, is_whole))
}

fn number(option: &str, text: Option<&str>) -> Result<Option<usize>> {
    let parse = |text: &str| text.parse().with_context(|| format!("{option} '{text}'"));
    text.map(parse).transpose()
}

/// Carries out what is no client's request.
fn carry_out(calls: Vec<Call>, microvm: &mut Microvm, files: &mut Files) -> Result<()> {
    for call in calls {
        let routed = Routed {
            call,
            deprecated: false,
        };
        if let Step::Answer(answer) = microvm.configure(routed, files)
            && answer.status >= 400
        {
            let body: serde_json::Value = serde_json::from_slice(answer.body.as_bytes())?;
            bail!("{}", body["fault_message"].as_str().unwrap_or(&answer.body));
        }
    }
    Ok(())
}

fn text_of(path: &str) -> Result<String> {
    armlet_system::files::text(Path::new(path), FILE_BYTES)
}

/// Listens where clients connect: whoever the umask lets. The socket outlives this process.
fn listen(args: &ApiArgs) -> Result<Server> {
    let path = args.api_sock.as_deref().unwrap_or(SOCKET);
    let body = number(
        "--http-api-max-payload-size",
        args.http_api_max_payload_size.as_deref(),
    )?;
    let listener = UnixListener::bind(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => anyhow!(
            "--api-sock: something is at {path} already; if nobody listens there any more, remove it"
        ),
        _ => anyhow!(error).context(format!("--api-sock: cannot listen at {path}")),
    })?;
    Server::new(Some(listener), body.unwrap_or(BODY_BYTES)).context("cannot serve the API")
}

/// Ends by the signal that stopped the machine, if one did; returns the exit status of Firecracker for
/// one of armlet's.
#[must_use]
pub fn end(status: Status) -> u8 {
    if status == Status::Stopped {
        armlet_system::raise::end_by(libc::SIGTERM);
    }
    exit_code(status)
}

fn exit_code(status: Status) -> u8 {
    match status {
        Status::Success | Status::GuestReset | Status::GuestFailed => 0,
        Status::Usage => 153,
        Status::Failure | Status::Host | Status::Forbidden | Status::Stopped | Status::NoMemory => {
            1
        }
    }
}
