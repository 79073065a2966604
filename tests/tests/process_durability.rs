//! What a 202 is worth: the order of system calls behind it, and what is left after `kill -9`.

use std::collections::{HashMap, HashSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outrigger_tests::process::http::Client;
use outrigger_tests::process::sink::Sink;
use outrigger_tests::process::{PATIENCE, Process, SidecarFiles, now, scratch, tool, wait_until};

/// Rounds of enqueueing that end with SIGKILL.
const ROUNDS: u64 = 20;

/// Callers at a time.
const CALLERS: u64 = 50;

/// Acknowledged messages that a run must have seen at least.
const ENOUGH: usize = 1_000;

/// A service whose every call becomes a message. `allowEphemeral`, because a container's overlay
/// file system survives the end of a process, which is what is tested here.
fn mesh(target: SocketAddr) -> String {
    format!(
        "apiVersion: outrigger.dev/v1alpha1\n\
         kind: MeshService\n\
         metadata: {{name: mailer}}\n\
         spec:\n\
        \x20 discovery: {{static: [{{address: {}, port: {}}}]}}\n\
         ---\n\
         apiVersion: outrigger.dev/v1alpha1\n\
         kind: MeshRoute\n\
         metadata: {{name: mailer}}\n\
         spec:\n\
        \x20 services: [mailer]\n\
        \x20 rules:\n\
        \x20 - async: {{when: Always, queue: mail, delivery: {{backoff: 100ms, maxBackoff: 1s}}}}\n\
         ---\n\
         apiVersion: outrigger.dev/v1alpha1\n\
         kind: Queue\n\
         metadata: {{name: mail}}\n\
         spec: {{backend: {{embedded: {{allowEphemeral: true}}}}}}\n",
        target.ip(),
        target.port()
    )
}

#[test]
fn no_acknowledged_message_is_lost_by_kill_9() {
    let dir = scratch();
    let sink = Sink::start();
    let files = SidecarFiles::write(dir.path(), "web", None, "");
    files.set_mesh(&mesh(sink.addr));
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    // By path, what was sent; by message id, the path of what was acknowledged.
    let sent = Mutex::new(HashMap::<String, Vec<u8>>::new());
    let acknowledged = Mutex::new(HashMap::<String, String>::new());
    let next = AtomicU64::new(0);
    let enqueue = |addr: SocketAddr, seed: u64| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let Ok(mut client) = Client::connect(addr) else {
            return;
        };
        loop {
            let path = format!("/mail/{}", next.fetch_add(1, Ordering::Relaxed));
            let body: Vec<u8> = (0..rng.usize(..4096)).map(|_| rng.u8(..)).collect();
            lock(&sent).insert(path.clone(), body.clone());
            let type_ = "content-type: application/octet-stream";
            // An error here is the kill: whether that message was taken is not known.
            let Ok(answer) = client.send("POST", &path, &["host: mailer", type_], &body) else {
                return;
            };
            // Opened anew after a kill, the store may need a moment. What it refuses then is as if
            // it was never sent: it must not be delivered either.
            if answer.status == 503 {
                assert_eq!(answer.field("outrigger-error"), Some("queue_unavailable"));
                lock(&sent).remove(&path);
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            assert_eq!(answer.status, 202, "{}", answer.text());
            let id = answer
                .field("outrigger-message-id")
                .expect("a 202 names its message");
            let twice = lock(&acknowledged).insert(id.to_owned(), path);
            assert!(twice.is_none(), "the id {id} was given twice");
        }
    };

    let mut round = 0;
    while round < ROUNDS || lock(&acknowledged).len() < ENOUGH {
        assert!(
            round < 3 * ROUNDS,
            "only {} acknowledged",
            lock(&acknowledged).len()
        );
        let mut sidecar = files.start();
        let addr = sidecar.outbound;
        let before = lock(&acknowledged).len();
        let lives = Duration::from_millis(rng.u64(20..400));
        let seeds: Vec<u64> = (0..CALLERS).map(|_| rng.u64(..)).collect();
        std::thread::scope(|scope| {
            for seed in seeds {
                scope.spawn(move || enqueue(addr, seed));
            }
            // In the middle of enqueueing, not of starting.
            wait_until("something is acknowledged", PATIENCE, || {
                lock(&acknowledged).len() > before
            });
            std::thread::sleep(lives);
            assert!(
                sidecar.process.is_running(),
                "it ended by itself: {}",
                sidecar.process.log()
            );
            sidecar.process.kill();
        });
        round += 1;
    }

    let sidecar = files.start();
    let acknowledged = acknowledged
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    let sent = sent.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{} acknowledged of {} sent in {round} rounds",
        acknowledged.len(),
        sent.len()
    );
    let missing = || {
        let received = sink.received();
        let arrived: HashSet<&str> = received
            .iter()
            .filter_map(|delivery| delivery.message.as_deref())
            .collect();
        acknowledged
            .keys()
            .filter(|id| !arrived.contains(id.as_str()))
            .count()
    };
    let end = now() + 3 * PATIENCE;
    while missing() > 0 {
        assert!(
            now() < end,
            "{} acknowledged messages were never delivered",
            missing()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    wait_until("the queue is empty", PATIENCE, || {
        sidecar.metric("outrigger_queue_depth", &[]) == Some(0.0)
    });
    for delivery in sink.received() {
        let Some(body) = sent.get(&delivery.path) else {
            panic!("{} was delivered but never sent", delivery.path);
        };
        assert!(
            *body == delivery.body,
            "the body of {} came changed",
            delivery.path
        );
        let id = delivery.message.expect("a delivery names its message");
        if let Some(path) = acknowledged.get(&id) {
            assert_eq!(
                *path, delivery.path,
                "message {id} is another one than was acknowledged"
            );
        }
    }
    let drift = sidecar.metric("outrigger_queue_conservation_drift", &[]);
    assert_eq!(drift, Some(0.0));
}

#[test]
fn a_202_is_written_only_after_an_fsync() {
    let dir = scratch();
    let sink = Sink::start();
    let files = SidecarFiles::write(dir.path(), "web", None, "");
    files.set_mesh(&mesh(sink.addr));
    let sidecar = files.start();
    let mut client = Client::connect(sidecar.outbound).unwrap();
    let mut post = |path: &str| {
        client
            .send("POST", path, &["host: mailer"], b"a letter")
            .unwrap()
    };
    // The first message opens the queue; and the connection is there before anybody looks.
    wait_until("the queue is open", PATIENCE, || {
        post("/warm-up").status == 202
    });

    // In a directory of its own: the sidecar watches the one its config is in.
    let traced = scratch();
    let trace = traced.path().join("trace");
    let mut command = tool("strace");
    command.args(["-f", "-y", "-tt", "-s", "64", "-e"]);
    command.arg("trace=fsync,fdatasync,msync,write,writev,sendto,sendmsg,read,readv,recvfrom");
    command
        .arg("-o")
        .arg(&trace)
        .arg("-p")
        .arg(sidecar.process.id().to_string());
    let mut strace = Process::start("strace", &mut command);
    strace.line("attached");
    for number in 0..5 {
        assert_eq!(post(&format!("/traced/{number}")).status, 202);
    }
    // A call that is under way when strace leaves is not in the trace. A connection is served in
    // order, so an answer to one request more proves that the calls of the others are over.
    assert_eq!(post("/last").status, 202);
    strace.signal("INT");
    strace.wait(PATIENCE);

    let trace = std::fs::read_to_string(&trace).unwrap();
    let calls = calls(&trace);
    let state = files.state.file_name().unwrap().to_str().unwrap();
    for number in 0..5 {
        let request = format!("POST /traced/{number} ");
        let arrived = calls.iter().position(|call| call.text.contains(&request));
        let arrived = arrived.unwrap_or_else(|| panic!("no read of {request} in\n{trace}"));
        let answered = calls[arrived..]
            .iter()
            .find(|call| call.text.contains("HTTP/1.1 202"));
        let answered = answered.unwrap_or_else(|| panic!("no write of a 202 in\n{trace}"));
        let synced = calls.iter().find(|call| {
            let sync = call.name == "fsync" || call.name == "fdatasync";
            let ours = call.text.contains(&format!("/{state}/")) && call.text.ends_with("= 0");
            let between = call.begin > calls[arrived].end && call.end < answered.begin;
            sync && ours && between
        });
        let synced = synced.unwrap_or_else(|| panic!("no fsync before the 202 in\n{trace}"));
        println!("{} | {}", synced.text, answered.text);
    }
}

/// One system call of a trace; `begin` and `end` are lines, for threads interleave.
struct Call {
    name: String,
    text: String,
    begin: usize,
    end: usize,
}

/// Puts calls that were interrupted in the trace (`<unfinished ...>`, `… resumed>`) together.
fn calls(trace: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut unfinished: HashMap<&str, (usize, String)> = HashMap::new();
    for (at, line) in trace.lines().enumerate() {
        let mut parts = line.splitn(2, char::is_whitespace);
        let (Some(thread), Some(rest)) = (parts.next(), parts.next()) else {
            continue;
        };
        // After the thread comes the time of day.
        let Some((_, text)) = rest.trim_start().split_once(' ') else {
            continue;
        };
        if let Some(begun) = text.strip_suffix(" <unfinished ...>") {
            unfinished.insert(thread, (at, begun.to_owned()));
            continue;
        }
        let (begin, text) = match text.split_once(" resumed>") {
            Some((_, rest)) => match unfinished.remove(thread) {
                Some((begin, begun)) => (begin, begun + rest),
                None => continue,
            },
            None => (at, text.to_owned()),
        };
        let name = text.split('(').next().unwrap_or_default().to_owned();
        calls.push(Call {
            name,
            text,
            begin,
            end: at,
        });
    }
    calls
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A service that counts requests, makes something of most, and never answers `/hang`.
fn maker() -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("an address");
    let hits = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&hits);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let seen = Arc::clone(&seen);
            std::thread::spawn(move || make(stream, &seen));
        }
    });
    (addr, hits)
}

fn make(mut stream: TcpStream, seen: &AtomicU64) {
    let mut read = Vec::new();
    let mut piece = [0; 4096];
    loop {
        // Bodies of these tests end with a full stop, heads have none behind them.
        while !read.ends_with(b".") {
            match stream.read(&mut piece) {
                Ok(0) | Err(_) => return,
                Ok(count) => read.extend_from_slice(&piece[..count]),
            }
        }
        seen.fetch_add(1, Ordering::SeqCst);
        if read.starts_with(b"POST /hang") {
            loop {
                std::thread::park();
            }
        }
        read.clear();
        let answer = b"HTTP/1.1 201 Created\r\ncontent-length: 4\r\n\r\nmade";
        if stream.write_all(answer).is_err() {
            return;
        }
    }
}

#[test]
fn a_key_is_known_after_kill_9() {
    let dir = scratch();
    let (service, hits) = maker();
    let files = SidecarFiles::write(dir.path(), "web", None, "");
    let rule = "- async: {when: Always, queue: mail, delivery: {backoff: 100ms, maxBackoff: 1s}}";
    let keyed = mesh(service).replace(rule, "- idempotency: {}");
    assert!(keyed.contains("idempotency"));
    files.set_mesh(&keyed);
    let send = |addr: SocketAddr, path: &str| loop {
        let mut client = Client::connect(addr).expect("connected");
        let fields = [
            "host: mailer",
            &format!("idempotency-key: \"{}\"", &path[1..]),
        ];
        let answer = client.send("POST", path, &fields, b"make it.").ok()?;
        // Opened anew after a kill, the store may need a moment.
        if answer.status != 503 {
            return Some(answer);
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut sidecar = files.start();
    let addr = sidecar.outbound;
    let first = send(addr, "/make").expect("an answer");
    assert_eq!((first.status, first.text().as_str()), (201, "made"));
    // What is acknowledged is known; what is under way when the kill comes is not.
    let hanging = std::thread::spawn(move || send(addr, "/hang").is_none());
    wait_until("it is sent", PATIENCE, || hits.load(Ordering::SeqCst) == 2);
    sidecar.process.kill();
    assert!(
        hanging.join().expect("no panic"),
        "the caller got no answer"
    );

    let sidecar = files.start();
    let again = send(sidecar.outbound, "/make").expect("an answer");
    assert_eq!((again.status, again.text().as_str()), (201, "made"));
    assert_eq!(again.field("outrigger-idempotency"), Some("replayed"));
    let unknown = send(sidecar.outbound, "/hang").expect("an answer");
    assert_eq!(unknown.status, 409, "{}", unknown.text());
    assert_eq!(
        unknown.field("outrigger-error"),
        Some("idempotency_conflict")
    );
    assert_eq!(hits.load(Ordering::SeqCst), 2, "neither was sent again");
}

#[test]
fn a_try_that_kill_9_met_counts_and_is_made_again() {
    let dir = scratch();
    let (service, hits) = maker();
    let files = SidecarFiles::write(dir.path(), "web", None, "");
    files.set_mesh(&mesh(service));
    let mut sidecar = files.start();
    let mut client = Client::connect(sidecar.outbound).expect("connected");
    let accepted = loop {
        let answer = client.send("POST", "/hang", &["host: mailer"], b"make it.");
        let answer = answer.expect("an answer");
        if answer.status == 202 {
            break answer;
        }
        std::thread::sleep(Duration::from_millis(5)); // opened anew
    };
    let id = accepted
        .field("outrigger-message-id")
        .expect("an id")
        .to_owned();
    wait_until("it is sent", PATIENCE, || hits.load(Ordering::SeqCst) == 1);
    // What is shown of a message is on disk; a try that is a moment old may not be.
    let shown = sidecar.admin(&format!("/messages/{id}"));
    assert_eq!(shown.expect("an answer").status, 200);
    sidecar.process.kill();
    let sidecar = files.start();
    wait_until("it is sent again", PATIENCE, || {
        hits.load(Ordering::SeqCst) == 2
    });
    let view = sidecar
        .admin(&format!("/messages/{id}"))
        .expect("an answer");
    let view: serde_json::Value = serde_json::from_slice(&view.body).expect("JSON");
    assert_eq!(view["status"], "delivering", "{view}");
    assert_eq!(view["attemptsSpent"], 1, "{view}");
    assert_eq!(view["attempts"][0]["reason"], "interrupted", "{view}");
}

/// What the receiver of events was told of one message, in order: number and kind.
type Life = Vec<(u64, String)>;

#[test]
fn events_are_told_at_least_once_and_in_order_over_kill_9() {
    const ROUNDS: u64 = 6;
    let dir = scratch();
    let (service, receiver) = (Sink::start(), Sink::start());
    let files = SidecarFiles::write(dir.path(), "web", None, "");
    let backend = "spec: {backend: {embedded: {allowEphemeral: true}}}";
    let told = format!(
        "spec: {{backend: {{embedded: {{allowEphemeral: true}}}}, \
         events: {{url: \"http://{}/\", batch: 7}}}}",
        receiver.addr
    );
    let yaml = mesh(service.addr).replace(backend, &told);
    assert!(yaml.contains("events"));
    files.set_mesh(&yaml);
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut acknowledged = HashSet::new();
    for _ in 0..ROUNDS {
        let mut sidecar = files.start();
        let mut client = Client::connect(sidecar.outbound).expect("connected");
        let wanted = acknowledged.len() + rng.usize(5..40);
        while acknowledged.len() < wanted {
            let answer = client.send("POST", "/mail", &["host: mailer"], b"x");
            let answer = answer.expect("it is not killed yet");
            if answer.status == 202 {
                let id = answer.field("outrigger-message-id").expect("an id");
                acknowledged.insert(id.to_owned());
            } else {
                std::thread::sleep(Duration::from_millis(5)); // opened anew
            }
        }
        sidecar.process.kill();
    }
    let _sidecar = files.start();
    let lives = || {
        let mut lives = HashMap::<String, Life>::new();
        for post in receiver.received() {
            let events: serde_json::Value = serde_json::from_slice(&post.body).expect("JSON");
            for event in events.as_array().expect("a batch") {
                let text = |key: &str| event[key].as_str().expect("text").to_owned();
                let seq = text("sequence").parse().expect("a number");
                let kind = text("type").rsplit('.').next().expect("a word").to_owned();
                lives.entry(text("subject")).or_default().push((seq, kind));
            }
        }
        lives
    };
    wait_until("the end of all of them is told", 3 * PATIENCE, || {
        let lives = lives();
        let ended = |id: &String| {
            let mut life = lives.get(id).into_iter().flatten();
            life.any(|(_, kind)| kind == "succeeded")
        };
        acknowledged.iter().all(ended)
    });
    let mut numbers = std::collections::BTreeMap::<u64, String>::new();
    for (id, life) in lives() {
        let mut latest = 0;
        let mut kinds = Vec::new();
        for (seq, kind) in life {
            let what = format!("{id} {kind}");
            let before = numbers.insert(seq, what.clone());
            assert!(
                before.is_none_or(|before| before == what),
                "{seq} is two things"
            );
            // Told again, it is what was told before.
            if seq > latest {
                latest = seq;
                kinds.push(kind);
            }
        }
        assert_eq!(kinds.first().map(String::as_str), Some("enqueued"), "{id}");
        let ends = kinds.iter().filter(|kind| *kind == "succeeded").count();
        assert!(ends <= 1, "{id} ended twice: {kinds:?}");
        if acknowledged.contains(&id) {
            assert_eq!(
                kinds.last().map(String::as_str),
                Some("succeeded"),
                "{kinds:?}"
            );
        }
    }
    let last = numbers.keys().next_back().copied().expect("events");
    let missing: Vec<u64> = (1..=last).filter(|n| !numbers.contains_key(n)).collect();
    assert_eq!(missing, [] as [u64; 0], "of {last}");
}
