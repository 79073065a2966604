//! Clients and servers that know nothing of messages, on both ends.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::Stdio;

use outrigger_tests::mesh::{Sidecar, queue, route, service, service_h2};
use outrigger_tests::process::python;

use crate::store_ready;

#[tokio::test]
async fn requests_curl_and_grpcio_send_and_receive_letters_byte_for_byte() {
    let mut script = python("letters.py");
    script.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut script = script.spawn().expect("it starts");
    let mut said = BufReader::new(script.stdout.take().expect("piped"));
    let reading = tokio::task::spawn_blocking(move || {
        let mut ports = String::new();
        said.read_line(&mut ports).expect("it says its ports");
        (ports, said)
    });
    let (ports, mut said) = reading.await.expect("no panic");
    let ports: Vec<SocketAddr> = ports
        .split_whitespace()
        .map(|port| SocketAddr::from(([127, 0, 0, 1], port.parse().expect("a port"))))
        .collect();
    let [mailer, orders] = ports[..] else {
        panic!("two ports, not {ports:?}")
    };
    let yaml = service("mailer", &[mailer], "")
        + &route("mailer", &["{async: {when: Preferred, queue: mail}}"])
        + &service_h2("orders", &[orders], "")
        + &route(
            "orders",
            &["{async: {when: Always, queue: mail, grpcAck: Empty}}"],
        )
        + &queue("mail", "");
    let sidecar = Sidecar::start(yaml).await;
    store_ready(&sidecar).await;
    let mut stdin = script.stdin.take().expect("piped");
    writeln!(stdin, "{}", sidecar.outbound()).expect("it reads");
    let ended = tokio::task::spawn_blocking(move || {
        let mut rest = String::new();
        let _ = said.read_line(&mut rest);
        (script.wait().expect("it ends"), rest)
    });
    let (status, rest) = ended.await.expect("no panic");
    assert!(status.success(), "{status}");
    assert_eq!(rest, "letters ok\n");
    crate::assert_no_drift(&sidecar.metrics().await);
}
