//! Guests that do what they should not, on this host's KVM. In a program of one thread, as a probe needs it; the exit
//! status says whether all went well, and a host without KVM says `skipped`.

use std::time::{Duration, Instant};

use vz_probe::{DEADLINE, Kvm, Payload, Speed, Unusable};

type Check = fn(&Kvm);

fn main() {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(why) => {
            vz_tally::skip!(test: "probe", "{why}");
            return;
        }
    };
    let checks: [(&str, Check); 5] = [
        ("a_probe_has_a_verdict_within_its_deadline", a_probe_has_a_verdict_within_its_deadline),
        ("a_loop_is_timed", a_loop_is_timed),
        ("a_guest_that_loops_is_ended", a_guest_that_loops_is_ended),
        ("a_triple_fault_is_told", a_triple_fault_is_told),
        ("an_unknown_port_is_told", an_unknown_port_is_told),
    ];
    for (name, check) in checks {
        let begun = Instant::now();
        check(&kvm);
        println!("test {name} ... ok ({} ms)", begun.elapsed().as_millis());
    }
}

fn a_probe_has_a_verdict_within_its_deadline(kvm: &Kvm) {
    let begun = Instant::now();
    let verdict = kvm.probe();
    println!("  {verdict:?}");
    // And the time in which a child is given up that cannot be killed.
    assert!(begun.elapsed() < DEADLINE + Duration::from_millis(300), "{:?}", begun.elapsed());
    match verdict {
        Ok(_) | Err(Unusable::TooSlow { .. }) => {}
        Err(Unusable::InternalError { suberror, bytes }) => assert!(suberror != 1 || !bytes.is_empty()),
        Err(other) => panic!("neither a processor nor an emulator: {other}"),
    }
}

fn a_loop_is_timed(kvm: &Kvm) {
    let verdict = kvm.run(&Payload::timing(), Duration::from_secs(5));
    println!("  {verdict:?}");
    match verdict {
        Ok(Speed { loop_ps }) | Err(Unusable::TooSlow { loop_ps }) => assert!(loop_ps > 0),
        other => panic!("{other:?}"),
    }
}

fn a_guest_that_loops_is_ended(kvm: &Kvm) {
    let begun = Instant::now();
    // jmp to itself
    let verdict = kvm.run(&Payload::new(&[0xeb, 0xfe]), Duration::from_millis(100));
    assert_eq!(verdict, Err(Unusable::Deadline { ms: 100 }));
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
}

fn a_triple_fault_is_told(kvm: &Kvm) {
    // An interrupt without a table of handlers: lidt [rdi + 8] (limit 2), int 0x80
    let verdict = kvm.run(&Payload::new(&[0x0f, 0x01, 0x5f, 0x08, 0xcd, 0x80]), Duration::from_secs(2));
    println!("  {verdict:?}");
    // A KVM that emulates may not get as far.
    assert!(matches!(verdict, Err(Unusable::TripleFault | Unusable::InternalError { .. })), "{verdict:?}");
}

fn an_unknown_port_is_told(kvm: &Kvm) {
    // mov eax, 7; out 0xf0, eax: a port that has no device even where KVM has some
    let verdict = kvm.run(&Payload::new(&[0xb8, 7, 0, 0, 0, 0xe7, 0xf0]), Duration::from_secs(2));
    assert_eq!(verdict, Err(Unusable::Exit { exit: "write of 0x7 to port 0xf0".into() }));
}
