//! The files that a server's TLS is made of: certificate, key, client authorities.
//!
//! What is wrong with a file is told in words of our own: the PEM reader's errors hold lines of the
//! file, and a line may be a private key.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{InconsistentKeys, RootCertStore, ServerConfig};

use crate::config::ConfigError;
use crate::tls::provider;

/// Bytes of one file. A system's whole bundle of authorities has a quarter of a million.
const LARGEST_FILE: u64 = 4 * 1024 * 1024;

pub(super) const CERT_FILE: &str = "tls cert_file";
pub(super) const KEY_FILE: &str = "tls key_file";

/// Which files, and what goes with them into each configuration made of them.
#[derive(Clone, Debug)]
pub(super) struct Files {
    pub(super) cert: PathBuf,
    pub(super) key: PathBuf,
    pub(super) client_ca: Option<ClientCa>,
    pub(super) alpn: Vec<Vec<u8>>,
}

/// Who may have signed a client's certificate.
#[derive(Clone, Debug)]
pub(super) struct ClientCa {
    pub(super) file: PathBuf,
    /// Whether a client must send one.
    pub(super) required: bool,
}

impl ClientCa {
    const fn setting(&self) -> &'static str {
        if self.required {
            "tls client_ca"
        } else {
            "tls client_ca_optional"
        }
    }
}

impl Files {
    pub(super) fn read(&self) -> Result<Contents, ConfigError> {
        Ok(Contents {
            cert: read(CERT_FILE, &self.cert)?,
            key: read(KEY_FILE, &self.key)?,
            client_ca: match &self.client_ca {
                Some(ca) => Some(read(ca.setting(), &ca.file)?),
                None => None,
            },
        })
    }

    /// A new configuration: a session that was made under an earlier one is not resumed, for that one
    /// may have trusted other clients.
    pub(super) fn config(&self, contents: &Contents) -> Result<ServerConfig, ConfigError> {
        let provider = provider();
        let key = private_key(&self.key, &contents.key)?;
        let key = provider
            .key_provider
            .load_private_key(key)
            .map_err(|error| {
                let help = "give an RSA key of 2048 to 8192 bits, ECDSA P-256 or P-384, or Ed25519";
                refused(KEY_FILE, &self.key, help).with_source(error)
            })?;
        let chain = certificates(CERT_FILE, &self.cert, &contents.cert)?;
        let certified = CertifiedKey::new(chain, key);
        match certified.keys_match() {
            Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            Err(rustls::Error::InconsistentKeys(_)) => {
                let help = format!(
                    "it is not the key of the first certificate in {:?}; give the two that belong \
                     together, the server's own certificate before those of its authorities",
                    self.cert
                );
                return Err(refused(KEY_FILE, &self.key, &help));
            }
            Err(error) => {
                let help = "its first certificate can't be read; have it made anew";
                return Err(refused(CERT_FILE, &self.cert, help).with_source(error));
            }
        }
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("ring supports the protocol versions that rustls has on by default");
        let builder = match (&self.client_ca, &contents.client_ca) {
            (Some(ca), Some(pem)) => {
                let roots = Arc::new(authorities(ca, pem)?);
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
                let verifier = if ca.required {
                    verifier
                } else {
                    verifier.allow_unauthenticated()
                };
                let verifier = verifier.build().map_err(|error| {
                    let help = "give a PEM file with the authorities of the clients' certificates";
                    refused(ca.setting(), &ca.file, help).with_source(error)
                })?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        config.alpn_protocols.clone_from(&self.alpn);
        Ok(config)
    }
}

/// What the files held at one moment.
pub(super) struct Contents {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Contents {
    /// Enough to know whether they changed, and not the key itself.
    pub(super) fn digest(&self) -> Digest {
        let Some(suite) = TLS13_AES_128_GCM_SHA256.tls13() else {
            unreachable!("it is a suite of TLS 1.3");
        };
        let sha256 = suite.common.hash_provider;
        let files = [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()];
        let each = files.into_iter().flatten().map(|file| sha256.hash(file));
        Digest(each.flat_map(|hash| hash.as_ref().to_vec()).collect())
    }
}

/// SHA-256 of each file, one after the other.
#[derive(PartialEq, Eq)]
pub(super) struct Digest(Vec<u8>);

/// A digest of a key helps nobody who reads a log.
impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digest")
    }
}

fn refused(setting: &str, path: &Path, help: &str) -> ConfigError {
    ConfigError::new(setting, &path.display().to_string(), help)
}

fn read(setting: &str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LARGEST_FILE + 1).read_to_end(&mut bytes))
        .map_err(|error| {
            refused(setting, path, "give a file that this process may read").with_source(error)
        })?;
    if bytes.len() as u64 > LARGEST_FILE {
        let help = "the file has more than 4 MiB; give one with certificates or a key only";
        return Err(refused(setting, path, help));
    }
    Ok(bytes)
}

fn certificates(
    setting: &str,
    path: &Path,
    bytes: &[u8],
) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let chain = CertificateDer::pem_slice_iter(bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| refused(setting, path, in_words(&error)))?;
    if chain.is_empty() {
        let help = "no certificate is in it; give a PEM file with `-----BEGIN CERTIFICATE-----`";
        return Err(refused(setting, path, help));
    }
    Ok(chain)
}

fn private_key(path: &Path, bytes: &[u8]) -> Result<PrivateKeyDer<'static>, ConfigError> {
    PrivateKeyDer::from_pem_slice(bytes).map_err(|error| {
        // `ENCRYPTED PRIVATE KEY` of PKCS#8, and `Proc-Type: 4,ENCRYPTED` of what was before it.
        let encrypted = bytes.windows(9).any(|word| word == b"ENCRYPTED");
        let help = match error {
            _ if encrypted => "the key is encrypted; decrypt it, as by `openssl pkey`",
            pem::Error::NoItemsFound => {
                "no private key is in it; give a PEM file with a key of PKCS#8, PKCS#1 or SEC1, as \
                 `-----BEGIN PRIVATE KEY-----`"
            }
            error => in_words(&error),
        };
        refused(KEY_FILE, path, help)
    })
}

fn authorities(ca: &ClientCa, bytes: &[u8]) -> Result<RootCertStore, ConfigError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(ca.setting(), &ca.file, bytes)? {
        roots.add(certificate).map_err(|error| {
            let help = "one of its certificates can't be an authority; take it out";
            refused(ca.setting(), &ca.file, help).with_source(error)
        })?;
    }
    Ok(roots)
}

/// Without a byte of the file.
const fn in_words(error: &pem::Error) -> &'static str {
    match error {
        pem::Error::MissingSectionEnd { .. } => {
            "a section has no `-----END ...-----` line; the file is cut off, write it anew"
        }
        pem::Error::IllegalSectionStart { .. } => {
            "a `-----BEGIN ...-----` line is malformed; it must end in five dashes, on a line of \
             its own"
        }
        pem::Error::Base64Decode(_) => "a section is not base64; write the file anew",
        _ => "it is not PEM; write the file anew",
    }
}
