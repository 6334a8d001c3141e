//! Small proxies: HTTP with CONNECT, SOCKS4a and SOCKS5. All lead to one destination, whatever they
//! are asked for, and keep what they were asked.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Answers a CONNECT with this.
    Connect(&'static str),
    Socks4,
    /// With the code of its reply.
    Socks5(u8),
}

pub(crate) const OK: Kind = Kind::Connect("200 OK");

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Proxy {
    pub(crate) async fn start(kind: Kind, destination: SocketAddr) -> Self {
        Self::start_with(kind, destination, None).await
    }

    pub(crate) async fn start_with(
        kind: Kind,
        destination: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let told = asked.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (told, tls) = (told.clone(), tls.clone());
                tokio::spawn(async move {
                    // A client may leave at any point.
                    let _ = match tls {
                        Some(tls) => match TlsAcceptor::from(tls).accept(tcp).await {
                            Ok(stream) => serve(stream, kind, destination, &told).await,
                            Err(error) => Err(error),
                        },
                        None => serve(tcp, kind, destination, &told).await,
                    };
                });
            }
        });
        Self { address, asked }
    }

    /// What it was asked, by connection.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

async fn serve(
    mut io: impl AsyncRead + AsyncWrite + Unpin,
    kind: Kind,
    destination: SocketAddr,
    told: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let (asked, answer, granted) = match kind {
        Kind::Connect(status) => {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(io.read_u8().await?);
            }
            let answer = format!("HTTP/1.1 {status}\r\n\r\n").into_bytes();
            let asked = String::from_utf8(head).unwrap();
            (asked, answer, status.starts_with('2'))
        }
        Kind::Socks4 => {
            let mut head = [0; 8];
            io.read_exact(&mut head).await?;
            let port = u16::from_be_bytes([head[2], head[3]]);
            let user = until_nul(&mut io).await?;
            let host = match [head[4], head[5], head[6], head[7]] {
                [0, 0, 0, 1..=255] => until_nul(&mut io).await?,
                address => IpAddr::from(address).to_string(),
            };
            let asked = format!("socks4 {user}@{host}:{port}");
            (asked, vec![0, 90, 0, 0, 0, 0, 0, 0], true)
        }
        Kind::Socks5(code) => {
            let _version = io.read_u8().await?;
            let mut methods = vec![0; usize::from(io.read_u8().await?)];
            io.read_exact(&mut methods).await?;
            let mut login = String::new();
            if methods.contains(&2) {
                io.write_all(&[5, 2]).await?;
                let _version = io.read_u8().await?;
                login = format!("{}:{}", short(&mut io).await?, short(&mut io).await?);
                io.write_all(&[1, 0]).await?;
            } else {
                io.write_all(&[5, 0]).await?;
            }
            let mut head = [0; 4];
            io.read_exact(&mut head).await?;
            let host = match head[3] {
                1 => {
                    let mut address = [0; 4];
                    io.read_exact(&mut address).await?;
                    IpAddr::from(address).to_string()
                }
                _ => short(&mut io).await?,
            };
            let port = io.read_u16().await?;
            let asked = format!("socks5 {login}@{host}:{port}");
            (asked, vec![5, code, 0, 1, 127, 0, 0, 1, 0, 80], code == 0)
        }
    };
    told.lock().unwrap().push(asked);
    io.write_all(&answer).await?;
    io.flush().await?;
    if granted {
        let mut onward = TcpStream::connect(destination).await?;
        copy_bidirectional(&mut io, &mut onward).await?;
    }
    Ok(())
}

async fn until_nul(io: &mut (impl AsyncRead + Unpin)) -> std::io::Result<String> {
    let mut text = Vec::new();
    loop {
        match io.read_u8().await? {
            0 => return Ok(String::from_utf8(text).unwrap()),
            byte => text.push(byte),
        }
    }
}

async fn short(io: &mut (impl AsyncRead + Unpin)) -> std::io::Result<String> {
    let mut text = vec![0; usize::from(io.read_u8().await?)];
    io.read_exact(&mut text).await?;
    Ok(String::from_utf8(text).unwrap())
}
