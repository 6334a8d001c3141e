use super::*;

mod kernel;

#[test]
fn a_peers_network_keeps_its_first_bits() {
    let socket = |local: &str, peer: &str| Socket {
        key: super::super::Key::from(&super::super::Tuple {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        }),
        cookie: 0,
        cgroup: 0,
        inode: 0,
        received: 0,
        to_send: 0,
        state: 1,
    };
    let v4 = socket("192.0.2.1:80", "198.51.100.77:1");
    let v6 = socket("[2001:db8::1]:80", "[2001:db8:1:2:3:4:5:6]:1");
    for (bits, four, six) in [
        ((0, 0), "0.0.0.0/0", "::/0"),
        ((8, 16), "198.0.0.0/8", "2001::/16"),
        ((24, 64), "198.51.100.0/24", "2001:db8:1:2::/64"),
        ((32, 128), "198.51.100.77/32", "2001:db8:1:2:3:4:5:6/128"),
    ] {
        let group_by = GroupBy::Subnet {
            v4: bits.0,
            v6: bits.1,
        };
        for (socket, ip, expected) in [(&v4, IpVersion::V4, four), (&v6, IpVersion::V6, six)] {
            match label(group_by, socket, ip) {
                Label::Subnet(address, bits) => assert_eq!(&*subnet(address, ip, bits), expected),
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn many_listening_ports_are_summed_beyond_the_bound() {
    let mut scanner = Monitor::builder().scanner().unwrap();
    for port in 1..=600 {
        let mut queue = Listening {
            port: Some(port),
            length: 1,
            limit: Some(2),
        };
        if port == 600 {
            queue.length = 5;
        }
        scanner.view.queues.insert(port, queue);
    }
    let rows = scanner.view.listening();
    assert_eq!(rows.len(), LISTENING + 1);
    let rest = rows.last().unwrap();
    assert_eq!((rest.port, rest.length, rest.limit), (None, 104, Some(200)));
}
