use super::*;
use armlet_devices::virtio::block::*;
use armlet_devices::virtio::queue::Segment;
use vm_memory::{GuestAddress, GuestMemoryMmap};

fn cpu() -> (f64, f64) {
    let mut u: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut u) };
    let t = |t: libc::timeval| t.tv_sec as f64 * 1e6 + t.tv_usec as f64;
    (t(u.ru_utime), t(u.ru_stime))
}

#[test]
#[ignore]
fn bench() {
    let dir = tempfile::tempdir_in(std::env::var("BDIR").unwrap_or("/tmp".into())).unwrap();
    let path = dir.path().join("x.img");
    let size: u64 = 512 << 20;
    {
        use std::io::Write;
        let mut f = File::create(&path).unwrap();
        for _ in 0..512 {
            f.write_all(&vec![7u8; 1 << 20]).unwrap();
        }
        f.sync_all().unwrap();
    }
    for cache in ["writeback", "none"] {
        for engine in ["sync", "io_uring"] {
            for op in [Operation::Read, Operation::Write] {
                for depth in [1usize, 32] {
                    let Ok(disk) = DiskOptions::parse(&format!(
                        "path={},cache={cache},engine={engine}",
                        path.display()
                    ))
                    .unwrap()
                    .open(0) else {
                        println!("skip");
                        continue;
                    };
                    let mut engine_ = disk.engine().unwrap();
                    let memory = Arc::new(
                        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap(),
                    );
                    engine_.start(&memory);
                    let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
                    if let Some(fd) = engine_.source() {
                        epoll
                            .ctl(
                                vmm_sys_util::epoll::ControlOperation::Add,
                                fd,
                                vmm_sys_util::epoll::EpollEvent::new(
                                    vmm_sys_util::epoll::EventSet::IN,
                                    0,
                                ),
                            )
                            .unwrap();
                    }
                    let mut seed = 12345u64;
                    let n = if cache == "none" { 4000 } else { 200000 };
                    let (u0, s0) = cpu();
                    let t0 = std::time::Instant::now();
                    let mut waits = 0;
                    let span = if op == Operation::Write && cache == "writeback" {
                        32u64 << 20
                    } else {
                        size
                    };
                    for _ in 0..n / depth {
                        let mut way = 0;
                        for tag in 0..depth {
                            seed = seed
                                .wrapping_mul(6364136223846793005)
                                .wrapping_add(1442695040888963407);
                            let off = (seed >> 33) % (span / 4096) * 4096;
                            let seg = [Segment {
                                address: GuestAddress(tag as u64 * 4096),
                                len: 4096,
                            }];
                            let r = Request {
                                tag: tag as u16,
                                operation: op,
                                offset: off,
                                len: 4096,
                                data: Data::new(&seg, 0, 4096),
                                durable: false,
                            };
                            if engine_.begin(&r).is_none() {
                                way += 1;
                            }
                        }
                        engine_.submit();
                        loop {
                            while let Some((_, o)) = engine_.finished() {
                                assert_eq!(o, Outcome::Done);
                                way -= 1;
                            }
                            if way == 0 {
                                break;
                            }
                            let mut ev = [vmm_sys_util::epoll::EpollEvent::default(); 2];
                            let _ = epoll.wait(-1, &mut ev);
                            waits += 1;
                        }
                    }
                    let dt = t0.elapsed().as_micros() as f64;
                    let (u1, s1) = cpu();
                    println!(
                        "{cache:10} {engine:9} {op:?} qd{depth}: user {:.2} us, sys {:.2} us, wall {:.2} us per request, waits {:.3}",
                        (u1 - u0) / n as f64,
                        (s1 - s0) / n as f64,
                        dt / n as f64,
                        waits as f64 / n as f64
                    );
                    engine_.stop();
                }
            }
        }
    }
}
