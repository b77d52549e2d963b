//! Which addresses of the internet are public: the only ones a client may send this server to.
//!
//! A block that is not listed as an exception is judged by its family: IPv4 is public unless a table
//! says otherwise, IPv6 only inside 2000::/3. Addresses that carry another address (mapped,
//! translated, tunnelled) are refused as such, whatever they carry: nobody serves pictures there.
//! Source: IANA's special-purpose address registries, RFC 6890 and what updates it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// First address of a block, its prefix length in bits, and what it is.
type Block<Address> = (Address, u32, &'static str);

const V4: [Block<Ipv4Addr>; 19] = [
    (Ipv4Addr::new(0, 0, 0, 0), 8, "unspecified"),
    (Ipv4Addr::new(10, 0, 0, 0), 8, "private"),
    (Ipv4Addr::new(100, 64, 0, 0), 10, "carrier-grade NAT"),
    (Ipv4Addr::new(127, 0, 0, 0), 8, "loopback"),
    (Ipv4Addr::new(169, 254, 0, 0), 16, "link-local"),
    (Ipv4Addr::new(172, 16, 0, 0), 12, "private"),
    (Ipv4Addr::new(192, 0, 0, 0), 24, "protocol assignment"),
    (Ipv4Addr::new(192, 0, 2, 0), 24, "documentation"),
    (Ipv4Addr::new(192, 31, 196, 0), 24, "AS112"),
    (Ipv4Addr::new(192, 52, 193, 0), 24, "multicast tunnel"),
    (Ipv4Addr::new(192, 88, 99, 0), 24, "6to4 relay"),
    (Ipv4Addr::new(192, 168, 0, 0), 16, "private"),
    (Ipv4Addr::new(192, 175, 48, 0), 24, "AS112"),
    (Ipv4Addr::new(198, 18, 0, 0), 15, "benchmarking"),
    (Ipv4Addr::new(198, 51, 100, 0), 24, "documentation"),
    (Ipv4Addr::new(203, 0, 113, 0), 24, "documentation"),
    (Ipv4Addr::new(224, 0, 0, 0), 4, "multicast"),
    (Ipv4Addr::BROADCAST, 32, "broadcast"),
    (Ipv4Addr::new(240, 0, 0, 0), 4, "reserved"),
];

const V6: [Block<Ipv6Addr>; 23] = [
    (Ipv6Addr::UNSPECIFIED, 128, "unspecified"),
    (Ipv6Addr::LOCALHOST, 128, "loopback"),
    (v6(0, 0), 96, "IPv4-compatible"),
    (
        Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0),
        96,
        "IPv4-mapped",
    ),
    (
        Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0),
        96,
        "IPv4-translated",
    ),
    (v6(0x64, 0xff9b), 96, "NAT64"),
    (
        Ipv6Addr::new(0x64, 0xff9b, 1, 0, 0, 0, 0, 0),
        48,
        "local NAT64",
    ),
    (v6(0x100, 0), 64, "discard-only"),
    (v6(0x2001, 0), 32, "Teredo"),
    (
        Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0),
        48,
        "benchmarking",
    ),
    (v6(0x2001, 0), 23, "protocol assignment"),
    (v6(0x2001, 0xdb8), 32, "documentation"),
    (v6(0x2002, 0), 16, "6to4"),
    (
        Ipv6Addr::new(0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0),
        48,
        "AS112",
    ),
    (v6(0x3fff, 0), 20, "documentation"),
    (v6(0x5f00, 0), 16, "segment routing"),
    (v6(0xfc00, 0), 7, "unique local"),
    (v6(0xfe80, 0), 10, "link-local"),
    (v6(0xfec0, 0), 10, "site-local"),
    (v6(0xff00, 0), 8, "multicast"),
    // What is left outside of 2000::/3 nobody has been given yet.
    (v6(0, 0), 3, "reserved"),
    (v6(0x4000, 0), 2, "reserved"),
    (v6(0x8000, 0), 1, "reserved"),
];

const fn v6(first: u16, second: u16) -> Ipv6Addr {
    Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, 0)
}

/// Whether an address is public.
///
/// # Errors
/// What it is instead, as an adjective.
pub(super) fn public(address: IpAddr) -> Result<(), &'static str> {
    let found = match address {
        IpAddr::V4(address) => V4
            .iter()
            .find(|(first, bits, _)| inside(address.to_bits(), first.to_bits(), *bits))
            .map(|(_, _, kind)| *kind),
        IpAddr::V6(address) => V6
            .iter()
            .find(|(first, bits, _)| inside6(address.to_bits(), first.to_bits(), *bits))
            .map(|(_, _, kind)| *kind),
    };
    found.map_or(Ok(()), Err)
}

fn inside(address: u32, first: u32, bits: u32) -> bool {
    (address ^ first) >> (u32::BITS - bits) == 0
}

fn inside6(address: u128, first: u128, bits: u32) -> bool {
    (address ^ first) >> (u128::BITS - bits) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(address: &str) -> Option<&'static str> {
        public(address.parse().expect("an address")).err()
    }

    #[test]
    fn the_edges_of_every_ipv4_block_are_inside_and_their_neighbours_are_not() {
        let blocks = [
            ("0.0.0.0", "0.255.255.255", "unspecified"),
            ("10.0.0.0", "10.255.255.255", "private"),
            ("100.64.0.0", "100.127.255.255", "carrier-grade NAT"),
            ("127.0.0.0", "127.255.255.255", "loopback"),
            ("169.254.0.0", "169.254.255.255", "link-local"),
            ("172.16.0.0", "172.31.255.255", "private"),
            ("192.0.0.0", "192.0.0.255", "protocol assignment"),
            ("192.0.2.0", "192.0.2.255", "documentation"),
            ("192.31.196.0", "192.31.196.255", "AS112"),
            ("192.52.193.0", "192.52.193.255", "multicast tunnel"),
            ("192.88.99.0", "192.88.99.255", "6to4 relay"),
            ("192.168.0.0", "192.168.255.255", "private"),
            ("192.175.48.0", "192.175.48.255", "AS112"),
            ("198.18.0.0", "198.19.255.255", "benchmarking"),
            ("198.51.100.0", "198.51.100.255", "documentation"),
            ("203.0.113.0", "203.0.113.255", "documentation"),
            ("224.0.0.0", "239.255.255.255", "multicast"),
            ("240.0.0.0", "255.255.255.254", "reserved"),
            ("255.255.255.255", "255.255.255.255", "broadcast"),
        ];
        for (first, last, expected) in blocks {
            assert_eq!(kind(first), Some(expected), "{first}");
            assert_eq!(kind(last), Some(expected), "{last}");
        }
        for public in [
            "1.0.0.0",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.0.3.0",
            "192.167.255.255",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "93.184.216.34",
        ] {
            assert_eq!(kind(public), None, "{public}");
        }
    }

    #[test]
    fn ipv6_is_public_only_where_somebody_was_given_it() {
        for (address, expected) in [
            ("::", "unspecified"),
            ("::1", "loopback"),
            ("::2", "IPv4-compatible"),
            ("::127.0.0.1", "IPv4-compatible"),
            ("::8.8.8.8", "IPv4-compatible"),
            ("::ffff:127.0.0.1", "IPv4-mapped"),
            ("::ffff:8.8.8.8", "IPv4-mapped"),
            ("::ffff:0:127.0.0.1", "IPv4-translated"),
            ("64:ff9b::127.0.0.1", "NAT64"),
            ("64:ff9b::8.8.8.8", "NAT64"),
            ("64:ff9b:1::1", "local NAT64"),
            ("64:ff9b:1:ffff:ffff:ffff:ffff:ffff", "local NAT64"),
            ("64:ff9b:2::1", "reserved"),
            ("100::1", "discard-only"),
            ("2001::1", "Teredo"),
            ("2001:0:7f00:1::", "Teredo"),
            ("2001:2::1", "benchmarking"),
            ("2001:10::1", "protocol assignment"),
            ("2001:20::1", "protocol assignment"),
            ("2001:1ff:ffff::", "protocol assignment"),
            ("2001:db8::1", "documentation"),
            ("2002:7f00:1::", "6to4"),
            ("2620:4f:8000::1", "AS112"),
            ("3fff::1", "documentation"),
            ("3fff:fff:ffff::", "documentation"),
            ("4000::1", "reserved"),
            ("5f00::1", "segment routing"),
            ("7fff::", "reserved"),
            ("8000::", "reserved"),
            ("fc00::1", "unique local"),
            ("fdff::1", "unique local"),
            ("fe00::1", "reserved"),
            ("fe80::1", "link-local"),
            ("febf::1", "link-local"),
            ("fec0::1", "site-local"),
            ("ff02::1", "multicast"),
        ] {
            assert_eq!(kind(address), Some(expected), "{address}");
        }
        for address in [
            "2000::1",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2003::1",
            "2606:4700::1111",
            "3ffe::1",
            "3fff:1000::1",
        ] {
            assert_eq!(kind(address), None, "{address}");
        }
    }
}
