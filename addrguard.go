package main

import (
	"net"
	"net/netip"
	"strings"
)

// addressRange is a block of addresses that no image is fetched from.
type addressRange struct {
	prefix  netip.Prefix
	use     string
	source  string
	private bool // permitted all the same by IMAGE_ALLOW_PRIVATE
}

// specialRanges holds every row of IANA's IPv4 and IPv6 Special-Purpose
// Address Registries (RFC 6890, RFC 8190), the rows marked globally reachable
// too, since they are anycast services and identifiers and none serves an
// image. Behind them stand multicast and what was withdrawn. The first row that
// holds an address decides, so a row stands before the one that it lies in.
//
// Two rows are missing on purpose: ::ffff:0:0/96 (IPv4-mapped) and 64:ff9b::/96
// (NAT64) are another spelling of an IPv4 address, and refuseAddress judges that.
// The other forms that carry one (IPv4-compatible, IPv4-translated, 6to4,
// Teredo, local NAT64) are refused whole, whatever they carry: no public server
// has such an address today, and there is no unwrapping to get wrong.
var specialRanges = []addressRange{
	special("0.0.0.0/32", "this host", "RFC 1122"),
	special("0.0.0.0/8", "this network", "RFC 791"),
	private("10.0.0.0/8", "private use", "RFC 1918"),
	special("100.64.0.0/10", "shared address space", "RFC 6598"),
	private("127.0.0.0/8", "loopback", "RFC 1122"),
	special("168.63.129.16/32", "Azure's internal services", "Microsoft, What is IP address 168.63.129.16"),
	private("169.254.0.0/16", "link-local", "RFC 3927"),
	private("172.16.0.0/12", "private use", "RFC 1918"),
	special("192.0.0.0/29", "IPv4 service continuity", "RFC 7335"),
	special("192.0.0.8/32", "IPv4 dummy address", "RFC 7600"),
	special("192.0.0.9/32", "PCP anycast", "RFC 7723"),
	special("192.0.0.10/32", "TURN anycast", "RFC 8155"),
	special("192.0.0.170/31", "NAT64 discovery", "RFC 7050"),
	special("192.0.0.0/24", "IETF protocol assignments", "RFC 6890"),
	special("192.0.2.0/24", "documentation", "RFC 5737"),
	special("192.31.196.0/24", "AS112", "RFC 7535"),
	special("192.52.193.0/24", "AMT", "RFC 7450"),
	special("192.88.99.2/32", "6a44 relay anycast", "RFC 6751"),
	special("192.88.99.0/24", "6to4 relay anycast", "RFC 7526"),
	private("192.168.0.0/16", "private use", "RFC 1918"),
	special("192.175.48.0/24", "AS112", "RFC 7534"),
	special("198.18.0.0/15", "benchmarking", "RFC 2544"),
	special("198.51.100.0/24", "documentation", "RFC 5737"),
	special("203.0.113.0/24", "documentation", "RFC 5737"),
	special("224.0.0.0/4", "multicast", "RFC 5771"),
	special("255.255.255.255/32", "limited broadcast", "RFC 919"),
	special("240.0.0.0/4", "reserved", "RFC 1112"),

	special("::/128", "unspecified", "RFC 4291"),
	private("::1/128", "loopback", "RFC 4291"),
	special("::/96", "IPv4-compatible", "RFC 4291"),
	special("::ffff:0:0:0/96", "IPv4-translated", "RFC 2765"),
	special("64:ff9b:1::/48", "local NAT64", "RFC 8215"),
	special("100::/64", "discard only", "RFC 6666"),
	special("100:0:0:1::/64", "dummy prefix", "RFC 9780"),
	special("2001::/32", "Teredo", "RFC 4380"),
	special("2001:1::1/128", "PCP anycast", "RFC 7723"),
	special("2001:1::2/128", "TURN anycast", "RFC 8155"),
	special("2001:1::3/128", "DNS-SD anycast", "RFC 9665"),
	special("2001:2::/48", "benchmarking", "RFC 5180"),
	special("2001:3::/32", "AMT", "RFC 7450"),
	special("2001:4:112::/48", "AS112", "RFC 7535"),
	special("2001:10::/28", "ORCHID", "RFC 4843"),
	special("2001:20::/28", "ORCHIDv2", "RFC 7343"),
	special("2001:30::/28", "drone identifiers", "RFC 9374"),
	special("2001::/23", "IETF protocol assignments", "RFC 2928"),
	special("2001:db8::/32", "documentation", "RFC 3849"),
	special("2002::/16", "6to4", "RFC 3056"),
	special("2620:4f:8000::/48", "AS112", "RFC 7534"),
	special("3fff::/20", "documentation", "RFC 9637"),
	special("5f00::/16", "segment routing", "RFC 9602"),
	private("fc00::/7", "unique local", "RFC 4193"),
	private("fe80::/10", "link-local", "RFC 4291"),
	special("fec0::/10", "site-local", "RFC 3879"),
	special("ff00::/8", "multicast", "RFC 4291"),
}

var (
	// nat64 is how a host with nothing but IPv6 reaches IPv4: the last 32 bits
	// are the IPv4 address (RFC 6052 section 2.2).
	nat64 = netip.MustParsePrefix("64:ff9b::/96")

	// globalUnicast is all that IANA hands out for unicast (RFC 4291 section
	// 2.4 and IANA's IPv6 address space registry). The rest is not routed.
	globalUnicast = netip.MustParsePrefix("2000::/3")
)

func special(prefix, use, source string) addressRange {
	return addressRange{prefix: netip.MustParsePrefix(prefix), use: use, source: source}
}

func private(prefix, use, source string) addressRange {
	r := special(prefix, use, source)
	r.private = true
	return r
}

// refuseAddress says why nothing may be fetched from addr, "" if it may: only
// public unicast addresses pass, and the private rows with allowPrivate. It
// never names addr, which the user may not be meant to learn from a name.
func refuseAddress(addr netip.Addr, allowPrivate bool) string {
	// Prefixes hold neither mapped addresses nor those with a zone.
	addr = addr.Unmap().WithZone("")
	for _, r := range specialRanges {
		if !r.prefix.Contains(addr) {
			continue
		}
		if r.private && allowPrivate {
			return ""
		}
		return r.use + ", " + r.source
	}
	switch {
	case addr.Is4():
		return ""
	case nat64.Contains(addr), globalUnicast.Contains(addr) && isISATAP(addr):
		b := addr.As16()
		return refuseAddress(netip.AddrFrom4([4]byte(b[12:])), allowPrivate)
	case globalUnicast.Contains(addr):
		return ""
	}
	return "outside global unicast, RFC 4291"
}

// isISATAP tells whether the interface identifier of an IPv6 address says that
// its last 32 bits are an IPv4 address to tunnel to: 0000:5efe or, with the
// universal bit, 0200:5efe (RFC 5214 section 6.1). Any prefix may stand before it.
func isISATAP(addr netip.Addr) bool {
	b := addr.As16()
	return b[8]&^2 == 0 && b[9] == 0 && b[10] == 0x5e && b[11] == 0xfe
}

// checkDial decides on the address and port that a socket is about to connect to.
// It returns an *imageError.
func (l fetchLimits) checkDial(address string) error {
	target, err := netip.ParseAddrPort(address)
	if err != nil {
		return permanent("forbidden_address", "not an IP address and port")
	}
	if reason := refuseAddress(target.Addr(), l.AllowPrivate); reason != "" {
		return permanent("forbidden_address", "not a public address (%s)", reason)
	}
	if port := target.Port(); port != 80 && port != 443 && !l.AllowPrivate {
		return permanent("forbidden_port", "port %d is not allowed, only 80 and 443 are", port)
	}
	return nil
}

// isOddIPv4 tells whether some resolvers would read host as an IPv4 address
// ("127.1", "0x7f.0.0.1", "2130706433", "127.0.0.1.") although it is not written
// as one. The test is the URL Standard's "ends in a number": no top-level
// domain is a number, so no true name is caught.
func isOddIPv4(host string) bool {
	if net.ParseIP(host) != nil || strings.Contains(host, ":") {
		return false
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	label := host[strings.LastIndexByte(host, '.')+1:]
	if hex, ok := strings.CutPrefix(label, "0x"); ok {
		return strings.Trim(hex, "0123456789abcdef") == ""
	}
	return label != "" && strings.Trim(label, "0123456789") == ""
}
