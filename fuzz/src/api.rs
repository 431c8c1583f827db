//! Clients of Firecracker's API that send what they like, and configuration files.

use armlet_api::http::{Answer, Input, Requests};
use armlet_api::microvm::Identity;
use armlet_api::model::{
    BalloonHint, BootSource, Drive, DrivePatch, Logger, Metrics, NetPatch, NetworkInterface,
    PmemPatch, SnapshotCreate, SnapshotLoad, Vsock,
};
use armlet_api::route::Routed;
use armlet_api::{Machine, Microvm, Refusal, Resources, Step, config_file};

/// The most bytes of a body, and of metadata.
const BODY: usize = 300;

/// A host that does all that is asked for, but what has an odd number of bytes.
#[derive(Default)]
struct Host {
    is_paused: bool,
}

fn odd(text: &str) -> Result<(), Refusal> {
    match text.len().is_multiple_of(2) {
        true => Ok(()),
        false => Err(format!("no \"{text}\"")),
    }
}

impl Resources for Host {
    fn check_boot_source(&mut self, source: &BootSource) -> Result<(), Refusal> {
        odd(&source.kernel_image_path)
    }

    fn check_drive(&mut self, drive: &Drive) -> Result<(), Refusal> {
        odd(drive.path_on_host.as_deref().unwrap_or_default())
    }

    fn open_tap(&mut self, interface: &NetworkInterface) -> Result<(), Refusal> {
        odd(&interface.host_dev_name)
    }

    fn bind_vsock(&mut self, vsock: &Vsock) -> Result<(), Refusal> {
        odd(&vsock.uds_path)
    }

    fn configure_logger(&mut self, _: &Logger) -> Result<(), Refusal> {
        Ok(())
    }

    fn configure_metrics(&mut self, _: &Metrics) -> Result<(), Refusal> {
        Ok(())
    }

    fn open_snapshot(&mut self, load: &SnapshotLoad) -> Result<String, Refusal> {
        // What was named is what was configured.
        Ok(load.snapshot_path.display().to_string())
    }
}

impl Machine for Host {
    fn is_paused(&mut self) -> Result<bool, Refusal> {
        Ok(self.is_paused)
    }

    fn set_paused(&mut self, paused: bool) -> Result<(), Refusal> {
        self.is_paused = paused;
        Ok(())
    }

    fn press_power_key(&mut self) -> Result<(), Refusal> {
        Err("no key".to_owned())
    }

    fn flush_metrics(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn change_drive(&mut self, _: usize, patch: &DrivePatch) -> Result<(), Refusal> {
        odd(patch.path_on_host.as_deref().unwrap_or_default())
    }

    fn change_interface(&mut self, _: usize, _: &NetPatch) -> Result<(), Refusal> {
        Ok(())
    }

    fn change_pmem(&mut self, _: usize, _: &PmemPatch) -> Result<(), Refusal> {
        Ok(())
    }

    fn set_balloon(&mut self, _: u32) -> Result<(), Refusal> {
        Ok(())
    }

    fn set_balloon_interval(&mut self, _: u16) -> Result<(), Refusal> {
        Ok(())
    }

    fn balloon_statistics(&mut self) -> Result<serde_json::Value, Refusal> {
        Ok(serde_json::Value::Null)
    }

    fn hint(&mut self, _: BalloonHint) -> Result<(), Refusal> {
        Err("no hints".to_owned())
    }

    fn hinting_status(&mut self) -> Result<serde_json::Value, Refusal> {
        Ok(serde_json::Value::Null)
    }

    fn snapshot(&mut self, _: &SnapshotCreate, config: serde_json::Value) -> Result<(), Refusal> {
        let text = config.to_string();
        config_file::read(&text, |path| Err(path.to_owned())).map(drop)
    }

    fn publish_mmds(&mut self, _: &serde_json::Value) {}
}

/// The first byte says how many bytes come at a time; none for a configuration file.
pub(crate) fn api(data: &[u8]) {
    let Some((first, data)) = data.split_first() else {
        return;
    };
    let identity = Identity {
        id: "x".to_owned(),
        version: "1.0.0",
        is_x86: first % 2 == 0,
    };
    let mut microvm = Microvm::new(identity, BODY);
    let mut host = Host::default();
    if *first == 0 {
        let text = String::from_utf8_lossy(data);
        for call in config_file::read(&text, |_| Ok("{}".to_owned())).unwrap_or_default() {
            let routed = Routed {
                call,
                deprecated: false,
            };
            if let Step::Answer(answer) = microvm.configure(routed, &mut host) {
                is_sound(&answer);
            }
        }
        return;
    }
    let mut requests = Requests::default();
    let mut is_started = false;
    for piece in data.chunks(usize::from(*first)) {
        requests.push(piece);
        while let Some(input) = requests.take(BODY) {
            let answer = match input {
                Input::Continue => continue,
                Input::Wrong(why) => Answer::wrong(&why),
                Input::Request(request) => {
                    let body = request.body.as_ref().map_or(0, Vec::len);
                    assert!(body <= BODY, "a body of {body} bytes");
                    if is_started {
                        microvm.handle_running(&request, &mut host)
                    } else {
                        match microvm.handle(&request, &mut host) {
                            Step::Answer(answer) => answer,
                            Step::End(answer) => {
                                is_sound(&answer);
                                return;
                            }
                            Step::Start => {
                                is_started = true;
                                Answer::done()
                            }
                        }
                    }
                }
            };
            is_sound(&answer);
        }
    }
}

/// An answer is one that clients can read.
fn is_sound(answer: &Answer) {
    assert!(matches!(answer.status, 200 | 204 | 400 | 413), "{answer:?}");
    match answer.status {
        204 => assert_eq!(answer.body, ""),
        _ => {
            let body: Result<serde_json::Value, _> = serde_json::from_str(&answer.body);
            body.expect("JSON");
        }
    }
    assert!(answer.to_bytes().starts_with(b"HTTP/1.1 "));
}
