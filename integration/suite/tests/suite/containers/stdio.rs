//! Standard input and output: whole, in order, on terminals and pipes.

use std::io::Write;

use vz_suite::{
    Lab, Verdict,
    command::Program,
    container::{Container, Task},
    lab::BUSYBOX,
    pty::Session,
    tests,
};

tests![
    a_quarter_gigabyte_passes_unchanged_and_ends_in_order,
    bytes_pass_unchanged_through_ctr_run_and_exec,
    stdout_and_stderr_are_kept_apart,
    closing_stdin_ends_the_reader,
    a_terminal_is_a_terminal_and_its_resize_is_seen,
    a_terminal_of_an_exec_is_resized,
    keys_on_a_terminal_are_signals,
    output_of_a_process_that_ends_at_once_is_never_lost,
    output_of_an_exec_that_ends_at_once_is_never_lost,
    output_waits_for_the_next_client,
    a_terminal_that_is_closed_and_opened_again_goes_on,
];

/// Bytes that do not repeat.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = Vec::with_capacity(bytes);
    while noise.len() < bytes {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise
}

/// Fails the test unless `found` is `wanted` and then the line END.
#[track_caller]
fn check(found: &[u8], wanted: &[u8]) {
    assert_eq!(found.len(), wanted.len() + 4, "bytes received");
    let (bytes, end) = found.split_at(wanted.len());
    assert_eq!(end, b"END\n");
    if bytes != wanted {
        let first = bytes.iter().zip(wanted).position(|(found, wanted)| found != wanted);
        panic!("the bytes are others from the {first:?}th on");
    }
}

fn a_quarter_gigabyte_passes_unchanged_and_ends_in_order(lab: &Lab) -> Verdict {
    let input = noise(256 << 20);
    // Without nerdctl's log, which would be JSON and several times as large.
    let args = ["--rm", "-i", "--log-driver", "none", BUSYBOX, "sh", "-c", "cat; echo END"];
    let output = lab.nerdctl_run(&args).input(&input).deadline(240).run();
    output.exits(0);
    check(&output.stdout, &input);
    println!("  256 MiB in and out, and a boot: {:.1} s", output.took.as_secs_f64());
    Ok(())
}

fn bytes_pass_unchanged_through_ctr_run_and_exec(lab: &Lab) -> Verdict {
    let input = noise(16 << 20);
    let script = ["sh", "-c", "cat; echo END"];
    let run = |program: Program| {
        let output = program.args(script).input(&input).run();
        output.exits(0);
        check(&output.stdout, &input);
    };
    run(lab.ctr_run(&["--rm", BUSYBOX, &lab.id("cat")]));
    let container = Container::start(lab, "cat", &[BUSYBOX, "sleep", "1000"]);
    run(lab.nerdctl(&["exec", "-i", &container.name]));
    run(lab.ctr(&["task", "exec", "--exec-id", "vzt-cat", &container.id]));
    Ok(())
}

fn stdout_and_stderr_are_kept_apart(lab: &Lab) -> Verdict {
    let output = lab.nerdctl_run(&["--rm", BUSYBOX, "sh", "-c", "echo out; echo err >&2; echo out2"]).run();
    assert_eq!(output.ok(), "out\nout2");
    assert_eq!(output.errors(), "err");
    Ok(())
}

fn closing_stdin_ends_the_reader(lab: &Lab) -> Verdict {
    let args = ["--rm", "-i", BUSYBOX, "sh", "-c", "while read line; do echo got $line; done; echo END"];
    let mut client = lab.nerdctl_run(&args).piped().start();
    let say = |client: &mut vz_suite::command::Running, text: &str| {
        client.stdin.as_mut().expect("stdin is a pipe").write_all(text.as_bytes()).expect("write to a pipe");
    };
    say(&mut client, "one\n");
    client.expect("got one");
    say(&mut client, "two\n");
    client.expect("got two");
    assert!(!client.stdout().contains("END"));
    client.stdin = None;
    assert_eq!(client.wait().ok(), "got one\ngot two\nEND");
    Ok(())
}

fn a_terminal_is_a_terminal_and_its_resize_is_seen(lab: &Lab) -> Verdict {
    let id = lab.id("tty");
    let args = ["run", "--rm", "-it", "--name", &id, "--runtime", lab.runtime(), "--net", "none", BUSYBOX, "sh"];
    let mut session = Session::start("nerdctl", &args, lab.env(), (30, 100));
    session.type_in("test -t 0 && test -t 1 && test -t 2 && echo is''-a-tty; tty\n");
    session.expect("is-a-tty");
    session.expect("/dev/pts/0");
    resized(&mut session, (30, 100), (51, 133));
    session.type_in("exit 9\n");
    let (code, screen) = session.wait();
    assert_eq!(code, 9, "{screen:?}");
    Ok(())
}

/// Checks the size that programs see, changes it, and checks again.
#[track_caller]
fn resized(session: &mut Session, before: (u16, u16), after: (u16, u16)) {
    // The client sets the first size after the start: whoever asks at once may be too early, so ask until it is seen.
    for (rows, columns) in [before, after] {
        session.resize(rows, columns);
        session.type_in(&format!(
            "until stty size | grep -qx '{rows} {columns}'; do usleep 20000; done; echo size''-{rows}-{columns}\n"
        ));
        session.expect(&format!("size-{rows}-{columns}"));
    }
}

fn a_terminal_of_an_exec_is_resized(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "tty", &[BUSYBOX, "sleep", "1000"]);
    let mut session = Session::start("nerdctl", &["exec", "-it", &container.name, "sh"], lab.env(), (20, 70));
    resized(&mut session, (20, 70), (44, 122));
    session.type_in("exit 4\n");
    let (code, screen) = session.wait();
    // nerdctl's own exit code is 1 whatever the process's is.
    assert!(code != 0 && screen.contains("exit code 4"), "{code} {screen:?}");
    let task = lab.id("exec");
    let args = ["task", "exec", "-t", "--exec-id", &task, &container.id, "sh"];
    let mut session = Session::start("ctr", &args, lab.env(), (21, 71));
    resized(&mut session, (21, 71), (45, 123));
    session.type_in("exit 5\n");
    let (code, screen) = session.wait();
    assert_eq!(code, 5, "{screen:?}");
    Ok(())
}

fn keys_on_a_terminal_are_signals(lab: &Lab) -> Verdict {
    let container = Container::start(lab, "keys", &[BUSYBOX, "sleep", "1000"]);
    let mut session = Session::start("nerdctl", &["exec", "-it", &container.name, "sh"], lab.env(), (24, 80));
    session.type_in("trap 'echo inter''rupted' INT; echo rea''dy\n");
    session.expect("ready");
    session.type_in("\u{3}");
    session.expect("interrupted");
    // The shell takes more than a line when it is there: what is typed before cat runs would be the shell's.
    session.type_in("sh -c \"echo star''ted; cat\"; echo cat''-ended\n");
    session.expect("started");
    session.type_in("text\n");
    session.expect("text\r\ntext\r\n");
    session.type_in("\u{4}");
    session.expect("cat-ended");
    session.type_in("\u{4}");
    session.wait();
    Ok(())
}

fn output_of_a_process_that_ends_at_once_is_never_lost(lab: &Lab) -> Verdict {
    for n in 0..lab.times(10, 200) {
        let text = format!("only line {n}");
        // Both clients, which differ in who reads and when they stop.
        if n % 2 == 0 {
            assert_eq!(lab.ctr_run(&["--rm", BUSYBOX, &lab.id("echo"), "echo", &text]).run().ok(), text);
        } else {
            assert_eq!(lab.nerdctl_run(&["--rm", BUSYBOX, "echo", &text]).run().ok(), text);
        }
    }
    Ok(())
}

fn output_of_an_exec_that_ends_at_once_is_never_lost(lab: &Lab) -> Verdict {
    let task = Task::start(lab, "echo", &[], BUSYBOX, &["sleep", "1000"]);
    for n in 0..lab.times(200, 2000) {
        let text = format!("only line {n}");
        let output = task.exec(&["sh", "-c", &format!("echo {text}; echo err {n} >&2")]).run();
        assert_eq!((output.ok(), output.errors()), (text, format!("err {n}")), "{output}");
    }
    Ok(())
}

fn output_waits_for_the_next_client(lab: &Lab) -> Verdict {
    let dir = lab.dir();
    let volume = format!("type=bind,src={},dst=/v,options=rbind:rw", dir.path().display());
    let bytes = 4_000_000;
    let script = format!(
        "echo first; until test -e /v/go; do usleep 20000; done; head -c {bytes} /dev/zero | tr '\\0' x; echo END; exit 5"
    );
    let task = Task::start(lab, "gone", &["--mount", &volume], BUSYBOX, &["sh", "-c", &script]);
    task.expect("first");
    task.kill_client();
    std::fs::write(dir.path().join("go"), "").expect("write a file");
    // A full pipe is nobody else's trouble.
    task.exec(&["true"]).run().ok();
    let output = task.ctr("attach").run();
    output.exits(5);
    let text = output.text();
    assert!(text.ends_with("xEND"), "the end of the output is missing");
    assert_eq!(text.len(), bytes + 3, "output was lost or repeated");
    Ok(())
}

fn a_terminal_that_is_closed_and_opened_again_goes_on(lab: &Lab) -> Verdict {
    // As systemd does with its console.
    let script = "echo first; exec 0<&- 1>&- 2>&-; sleep 1; echo second >/dev/console; sleep 1; \
                  exec >/dev/console 2>&1 </dev/console; echo third";
    let container = Container::start(lab, "reopen", &["-t", BUSYBOX, "sh", "-c", script]);
    container.nerdctl("wait").ok();
    let lines: Vec<String> = container.logs().lines().map(|line| line.trim().to_owned()).collect();
    assert_eq!(lines, ["first", "second", "third"]);
    let other = Container::start(lab, "other", &[BUSYBOX, "sleep", "1000"]);
    let script = "echo first; t=$(tty); exec 0<&- 1>&- 2>&-; sleep 1; echo second >$t";
    let args = ["exec", "-it", other.name.as_str(), "sh", "-c", script];
    let session = Session::start("nerdctl", &args, lab.env(), (24, 80));
    session.expect("first");
    session.expect("second");
    Ok(())
}
