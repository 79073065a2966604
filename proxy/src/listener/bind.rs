//! Binds listeners: one socket per worker and address, shared by SO_REUSEPORT.
//!
//! SO_REUSEPORT would also let a second process of the same user bind the same port and steal
//! half of the connections, so the first socket of an address is bound without it: that fails
//! when anybody listens there already, and a second instance is refused.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// Connections the kernel may hold before we accept them.
const BACKLOG: i32 = 4096;

/// The sockets of one address, one per worker, and the address with its real port.
pub struct Bound {
    /// The address; the port is real when 0 was asked for.
    pub addr: SocketAddr,
    /// One listening socket per worker.
    pub sockets: Vec<TcpListener>,
}

/// Binds `addr` for `workers` workers.
///
/// # Errors
/// The kernel's; `AddrInUse` when somebody listens there already.
pub fn bind(addr: SocketAddr, workers: usize) -> io::Result<Bound> {
    let probe = socket(addr)?;
    probe.bind(&addr.into())?;
    let addr = probe.local_addr()?.as_socket().unwrap_or(addr);
    if workers == 1 {
        return Ok(Bound {
            addr,
            sockets: vec![listen(probe)?],
        });
    }
    // The probe proved that nobody was there; between its end and the next line nobody may
    // come either, or the bind below fails for a foreign user and is shared for our own.
    drop(probe);
    let sockets = (0..workers)
        .map(|_| {
            let socket = socket(addr)?;
            socket.set_reuse_port(true)?;
            socket.bind(&addr.into())?;
            listen(socket)
        })
        .collect::<io::Result<Vec<_>>>()?;
    Ok(Bound { addr, sockets })
}

fn socket(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // Only skips the wait for old connections of a listener that is gone.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn listen(socket: Socket) -> io::Result<TcpListener> {
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_share_a_port_and_a_second_instance_is_refused() {
        for workers in [1, 2] {
            let bound = bind("127.0.0.1:0".parse().unwrap(), workers).unwrap();
            assert_eq!(bound.sockets.len(), workers);
            assert_ne!(bound.addr.port(), 0);
            let Err(second) = bind(bound.addr, 1) else {
                panic!("bound twice")
            };
            assert_eq!(
                second.kind(),
                io::ErrorKind::AddrInUse,
                "with {workers} workers"
            );
        }
    }
}
