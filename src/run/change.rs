//! What is changed of a device while its guest runs. The device's own thread does it, and answers: a
//! device that is at work, or storage that is slow, holds up nobody else.

use super::command::{BalloonReport, Reply};
use armlet_backends::backend::Backend;
use armlet_devices::virtio::DeviceState;
use armlet_devices::virtio::{Change, VirtioDevice, mailbox};

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
    let mut named = backends.iter().filter(|backend| backend.name() == name);
    let Some(disk) = named.find_map(|backend| backend.disk()) else {
        return reply.send(Err(format!("the guest has no disk called {name}")));
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

#[cfg(test)]
mod tests {
    use super::*;
    use armlet_backends::balloon::BalloonOptions;
    use armlet_backends::disk::DiskOptions;
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
    fn who_asks_for_what_is_not_there_is_answered() {
        let (reply, answer) = Reply::channel();
        set_balloon(&[], |_, _| panic!("nobody"), 0, reply);
        assert_eq!(
            answer.recv(),
            Ok(Err("the guest has no balloon".to_owned()))
        );
    }
}
