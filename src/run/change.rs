//! What is changed of a device while its guest runs. The device's own thread does it, and answers: a
//! device that is at work, or storage that is slow, holds up nobody else.

use super::command::{BalloonReport, Reply};
use armlet_backends::backend::{Backend, Flow};
use armlet_backends::disk::DiskHandle;
use armlet_devices::rate::Limits;
use armlet_devices::virtio::DeviceState;
use armlet_devices::virtio::{Change, VirtioDevice, mailbox};
use std::path::PathBuf;

/// Has the balloon hold so many bytes, in this life of the guest and the next; `post` submits a command
/// to a device, by its name.
pub(super) fn set_balloon(
    backends: &[Box<dyn Backend>],
    post: impl FnOnce(&str, mailbox::Command),
    bytes: u64,
    reply: Reply<Result<(), String>>,
) {
    let mut balloons = backends
        .iter()
        .filter_map(|backend| Some((backend.name(), backend.balloon()?)));
    let Some((name, balloon)) = balloons.next() else {
        return reply.send(Err("the guest has no balloon".to_owned()));
    };
    if let Err(why) = balloon.set(bytes) {
        return reply.send(Err(why));
    }
    let change = Change::BalloonTarget(bytes);
    let command = move |device: &mut dyn VirtioDevice| {
        device.change(change);
        reply.send(Ok(()));
    };
    post(&name, Box::new(command));
}

/// Answers with what the balloon holds, and has the guest asked anew; `post` as in [`set_balloon`].
pub(super) fn look_at_balloon(
    backends: &[Box<dyn Backend>],
    post: impl FnOnce(&str, mailbox::Command),
    reply: Reply<Result<BalloonReport, String>>,
) {
    let Some(name) = backends
        .iter()
        .find_map(|backend| backend.balloon().map(|_| backend.name()))
    else {
        return reply.send(Err("the guest has no balloon".to_owned()));
    };
    let command = move |device: &mut dyn VirtioDevice| {
        let mut report = BalloonReport {
            is_active: device.change(Change::BalloonStatistics),
            ..BalloonReport::default()
        };
        if let DeviceState::Balloon(state) = device.save() {
            report.target = u64::from(state.target) << 12;
            report.actual = u64::from(state.actual) << 12;
            report.statistics = state.statistics.unwrap_or_default();
        }
        reply.send(Ok(report));
    };
    post(&name, Box::new(command));
}

/// Has the disk of this name look at its image anew, and answers with the disk's bytes; `post` as in
/// [`set_balloon`].
pub(super) fn look_at_disk(
    backends: &[Box<dyn Backend>],
    post: impl FnOnce(&str, mailbox::Command),
    name: &str,
    reply: Reply<Result<u64, String>>,
) {
    let disk = match disk(backends, name) {
        Ok(disk) => disk,
        Err(why) => return reply.send(Err(why)),
    };
    let command = move |device: &mut dyn VirtioDevice| {
        reply.send(match disk.look() {
            Ok(bytes) => {
                device.change(Change::DiskSize(bytes));
                Ok(bytes)
            }
            Err(error) => Err(format!("{error:#}")),
        });
    };
    post(name, Box::new(command));
}

fn disk(backends: &[Box<dyn Backend>], name: &str) -> Result<DiskHandle, String> {
    let mut named = backends.iter().filter(|backend| backend.name() == name);
    let disk = named.find_map(|backend| backend.disk());
    disk.ok_or_else(|| format!("the guest has no disk called {name}"))
}

/// Gives the disk of this name the image at `path`, and answers with the disk's bytes; `post` as in
/// [`set_balloon`].
pub(super) fn change_disk(
    backends: &[Box<dyn Backend>],
    post: impl FnOnce(&str, mailbox::Command),
    name: &str,
    path: PathBuf,
    reply: Reply<Result<u64, String>>,
) {
    let disk = match disk(backends, name) {
        Ok(disk) => disk,
        Err(why) => return reply.send(Err(why)),
    };
    let command = move |device: &mut dyn VirtioDevice| {
        reply.send(match disk.change(&path) {
            Ok((bytes, change)) => {
                device.change(change);
                Ok(bytes)
            }
            Err(error) => Err(format!("{error:#}")),
        });
    };
    post(name, Box::new(command));
}

/// Changes those limits of a device that are named, in this life of the guest and the next.
///
/// # Errors
/// A device that is not there, or has no limits of this kind.
pub(super) fn set_limits(
    backends: &[Box<dyn Backend>],
    name: &str,
    flow: Flow,
    limits: &Limits,
) -> Result<(), String> {
    let mut named = backends.iter().filter(|backend| backend.name() == name);
    let backend = named
        .next()
        .ok_or_else(|| format!("the guest has no device called {name}"))?;
    let throttle = backend.throttle(flow);
    let throttle = throttle.ok_or_else(|| match flow {
        Flow::All => format!("{name} takes no limits"),
        Flow::Receive | Flow::Transmit => {
            format!("{name} takes no limits for what is received or sent")
        }
    })?;
    throttle.change(limits);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_backends::balloon::BalloonOptions;
    use armlet_backends::disk::{DiskOptions, Tail};
    use armlet_devices::sync::lock;
    use std::fs::File;

    /// Runs what is posted on `device` at once, as its thread would.
    fn at_once(device: &mut dyn VirtioDevice) -> impl FnOnce(&str, mailbox::Command) {
        move |_, command| command(device)
    }

    fn config<const N: usize>(device: &dyn VirtioDevice) -> [u8; N] {
        let mut bytes = [0; N];
        device.config().read(0, &mut bytes);
        bytes
    }

    #[test]
    fn a_balloon_has_its_target_in_this_life_and_the_next() {
        let options = BalloonOptions {
            target: 0,
            reporting: true,
            deflate_on_oom: true,
        };
        let backends: [Box<dyn Backend>; 1] = [Box::new(options.open(1 << 30))];
        let device = backends[0].device().expect("a device");
        let set = |bytes| {
            let (reply, answer) = Reply::channel();
            set_balloon(&backends, at_once(&mut *lock(&device)), bytes, reply);
            answer.recv().expect("an answer")
        };
        assert_eq!(set(512 << 20), Ok(()));
        let pages = (512_u32 << 20) / 4096;
        assert_eq!(config(&*lock(&device)), pages.to_le_bytes());
        let next = backends[0].device().expect("another");
        assert_eq!(config(&*lock(&next)), pages.to_le_bytes());
        let (reply, answer) = Reply::channel();
        look_at_balloon(&backends, at_once(&mut *lock(&next)), reply);
        let report = answer.recv().expect("an answer").expect("a balloon");
        assert_eq!((report.target, report.actual), (512 << 20, 0));
        assert!(!report.is_active);
        let why = set(1 << 30).expect_err("all of it");
        assert!(why.contains("leaves nothing of the guest's"), "{why}");
        assert_eq!(config(&*lock(&device)), pages.to_le_bytes());
    }

    #[test]
    fn a_disk_looks_at_its_size_anew() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.img");
        let file = File::create(&path).expect("a file");
        file.set_len(1 << 20).expect("room");
        let disk = DiskOptions::new(&path).open(3).expect("opens");
        let backends: [Box<dyn Backend>; 1] = [Box::new(disk)];
        let device = backends[0].device().expect("a device");
        let look = |name| {
            let (reply, answer) = Reply::channel();
            look_at_disk(&backends, at_once(&mut *lock(&device)), name, reply);
            answer.recv().expect("an answer")
        };
        for size in [3_u64 << 20, 2 << 20] {
            file.set_len(size).expect("room");
            assert_eq!(look("disk3"), Ok(size));
            assert_eq!(config(&*lock(&device)), (size / 512).to_le_bytes());
        }
        let why = look("disk0").expect_err("another");
        assert_eq!(why, "the guest has no disk called disk0");
    }

    #[test]
    fn a_disk_gets_another_image_in_this_life_and_the_next() {
        let folder = tempfile::tempdir().expect("a folder");
        let image = |name: &str, size| {
            let path = folder.path().join(name);
            let file = File::create(&path).expect("a file");
            file.set_len(size).expect("room");
            path
        };
        // Nothing stands for it yet.
        let (none, some) = (image("none", 0), image("some", 1 << 20));
        let mut options = DiskOptions::new(&none);
        options.tail = Tail::Hidden;
        let disk = options.open(0).expect("opens");
        let backends: [Box<dyn Backend>; 1] = [Box::new(disk)];
        let device = backends[0].device().expect("a device");
        let change = |path: &PathBuf| {
            let (reply, answer) = Reply::channel();
            let mut device = lock(&device);
            let post = at_once(&mut *device);
            change_disk(&backends, post, "disk0", path.clone(), reply);
            answer.recv().expect("an answer")
        };
        assert_eq!(config(&*lock(&device)), 0_u64.to_le_bytes());
        assert_eq!(change(&some), Ok(1 << 20));
        assert_eq!(config(&*lock(&device)), (2048_u64).to_le_bytes());
        // The rest of a sector is not seen.
        let odd = image("odd", 3 * 512 + 511);
        assert_eq!(change(&odd), Ok(3 * 512));
        // What cannot be had leaves all as it is.
        let missing = folder.path().join("missing");
        let why = change(&missing).expect_err("nothing there");
        assert!(why.contains("missing: No such file"), "{why}");
        let why = change(&folder.path().to_owned()).expect_err("a folder");
        assert!(why.contains("directory"), "{why}");
        assert_eq!(config(&*lock(&device)), 3_u64.to_le_bytes());
        let next = backends[0].device().expect("another");
        assert_eq!(config(&*lock(&next)), 3_u64.to_le_bytes());
        // The same file is looked at again.
        File::options()
            .write(true)
            .open(&odd)
            .expect("a file")
            .set_len(5 * 512)
            .expect("room");
        assert_eq!(change(&odd), Ok(5 * 512));
        // The ones before are nobody's any more, and this one is ours.
        let other = |path: &PathBuf| DiskOptions::new(path).open(1);
        drop(other(&some).expect("it is free"));
        assert!(other(&odd).is_err(), "it is locked");
    }

    #[test]
    fn limits_are_those_of_devices_that_have_some() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("disk.img");
        File::create(&path).expect("a file");
        let disk = DiskOptions::new(&path).open(0).expect("opens");
        let backends: [Box<dyn Backend>; 1] = [Box::new(disk)];
        let set = |name, flow| set_limits(&backends, name, flow, &Limits::default());
        assert_eq!(set("disk0", Flow::All), Ok(()));
        let why = set("disk0", Flow::Receive).expect_err("a disk");
        assert!(why.starts_with("disk0 takes no limits for what"), "{why}");
        let why = set("disk1", Flow::All).expect_err("none");
        assert_eq!(why, "the guest has no device called disk1");
    }

    #[test]
    fn who_asks_for_what_is_not_there_is_answered() {
        let (reply, answer) = Reply::channel();
        set_balloon(&[], |_, _| panic!("nobody"), 0, reply);
        assert_eq!(
            answer.recv(),
            Ok(Err("the guest has no balloon".to_owned()))
        );
    }
}
