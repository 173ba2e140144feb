package main

import (
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestAddressesThatArePublic(t *testing.T) {
	t.Parallel()
	for _, addr := range []string{
		"1.1.1.1", "8.8.8.8", "93.184.216.34", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2606:4700::1111",
		"2a00:1450:4001::5efe:8.8.8.8", "2a00:1450:4001::5eff:127.0.0.1", "2a00:1450:4001:0:100:5efe:7f00:1",
		// the neighbours of what is refused
		"1.0.0.0", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255", "128.0.0.0",
		"168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255", "172.32.0.0",
		"191.255.255.255", "192.0.1.0", "192.0.3.0", "192.167.255.255", "192.169.0.0", "198.17.255.255",
		"198.20.0.0", "203.0.112.255", "203.0.114.0", "223.255.255.255",
		"2000::", "2001:200::", "2001:db7::", "2001:db9::", "2003::", "2620:4e::", "2620:50::",
		"3ffe:ffff::", "3fff:1000::",
	} {
		if reason := refuseAddress(netip.MustParseAddr(addr), false); reason != "" {
			t.Errorf("%s is refused: %s", addr, reason)
		}
	}
}

func TestAddressesThatAllowPrivatePermits(t *testing.T) {
	t.Parallel()
	for addr, want := range map[string]bool{
		"127.0.0.1": true, "127.255.255.255": true, "10.1.2.3": true, "172.20.0.1": true, "192.168.1.1": true,
		"169.254.1.1": true, "::1": true, "fe80::1%eth0": true, "fd00::1": true, "::ffff:127.0.0.1": true,
		"64:ff9b::127.0.0.1": true, "8.8.8.8": true, "2606:4700::1111": true,
		"0.0.0.0": false, "::": false, "100.64.0.1": false, "168.63.129.16": false, "192.0.2.1": false,
		"224.0.0.1": false, "255.255.255.255": false, "::127.0.0.1": false, "2002:7f00:1::": false,
		"2001::1": false, "2001:db8::1": false, "64:ff9b:1::1": false, "ff02::1": false, "4000::1": false,
		"2a00:1450::5efe:0.0.0.0": false,
	} {
		if reason := refuseAddress(netip.MustParseAddr(addr), true); (reason == "") != want {
			t.Errorf("%s: %q, want permitted = %v", addr, reason, want)
		}
	}
}

func TestEveryRowOfTheTableDecides(t *testing.T) {
	t.Parallel()
	for i, r := range specialRanges {
		if r.prefix != r.prefix.Masked() || r.use == "" || r.source == "" {
			t.Errorf("row %v is not complete", r)
		}
		for _, later := range specialRanges[i+1:] {
			if r.prefix.Bits() <= later.prefix.Bits() && r.prefix.Overlaps(later.prefix) {
				t.Errorf("row %v hides row %v behind it", r.prefix, later.prefix)
			}
		}
		for _, addr := range []netip.Addr{r.prefix.Addr(), lastOf(r.prefix)} {
			if refuseAddress(addr, false) == "" {
				t.Errorf("%v, of %v, is not refused", addr, r.prefix)
			}
		}
	}
}

// lastOf returns the highest address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for bit := p.Bits(); bit < len(b)*8; bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	addr, _ := netip.AddrFromSlice(b)
	return addr
}

func TestHostsThatSomeReadAsIPv4(t *testing.T) {
	t.Parallel()
	for host, want := range map[string]bool{
		"127.1": true, "2130706433": true, "0x7f000001": true, "0X7F.1": true, "0177.0.0.1": true, "127.0.0.1.": true,
		"1.2.3.4.5": true, "256.256.256.256": true, "example.0x": true, "example.1": true,
		"127.0.0.1": false, "::1": false, "fe80::1%1": false, "example.com": false, "1.example.com.": false,
		"0x7f.example": false, "4chan": false, "example.0xyz": false, "": false, ".": false,
	} {
		if got := isOddIPv4(host); got != want {
			t.Errorf("isOddIPv4(%q) = %v, want %v", host, got, want)
		}
	}
}

// FuzzAddressGuard holds refuseAddress against isPublicNaively, which knows the
// same rules but shares nothing with it: no table, no netip.
func FuzzAddressGuard(f *testing.F) {
	for _, r := range specialRanges {
		f.Add(r.prefix.Addr().AsSlice())
		f.Add(lastOf(r.prefix).AsSlice())
		f.Add(lastOf(r.prefix).Next().AsSlice())
	}
	for _, addr := range []string{
		"8.8.8.8", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "2a00::5efe:127.0.0.1",
		"2a00::200:5efe:10.0.0.1", "2a00::200:5efe:8.8.8.8", "2606:4700::1111", "2001:0:7f00:1::80ff:fffe",
	} {
		f.Add(netip.MustParseAddr(addr).AsSlice())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		addr, ok := netip.AddrFromSlice(b)
		if !ok {
			return
		}
		reason := refuseAddress(addr, false)
		if want := isPublicNaively(b); (reason == "") != want {
			t.Errorf("%v: %q, want public = %v", addr, reason, want)
		}
		if reason == "" && refuseAddress(addr, true) != "" {
			t.Errorf("%v is refused only when more is allowed", addr)
		}
	})
}

func isPublicNaively(b []byte) bool {
	if len(b) == 4 {
		return isPublic4Naively(binary.BigEndian.Uint32(b))
	}
	digits := hex.EncodeToString(b)
	has := func(prefixes ...string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(digits, p) })
	}
	inner := isPublic4Naively(binary.BigEndian.Uint32(b[12:]))
	switch {
	case has("00000000000000000000ffff", "0064ff9b0000000000000000"):
		return inner
	case !has("2", "3"), has("200100", "200101", "20010db8", "2002", "2620004f8000", "3fff0"):
		return false
	case digits[16:24] == "00005efe", digits[16:24] == "02005efe":
		return inner
	}
	return true
}

func isPublic4Naively(n uint32) bool {
	a, b, c, d := n>>24, n>>16&255, n>>8&255, n&255
	switch a {
	case 0, 10, 127:
		return false
	case 100:
		return b < 64 || b > 127
	case 168:
		return b != 63 || c != 129 || d != 16
	case 169:
		return b != 254
	case 172:
		return b < 16 || b > 31
	case 192:
		special := b == 168 || b == 0 && (c == 0 || c == 2) || b == 31 && c == 196 || b == 52 && c == 193 ||
			b == 88 && c == 99 || b == 175 && c == 48
		return !special
	case 198:
		return b != 18 && b != 19 && (b != 51 || c != 100)
	case 203:
		return b != 0 || c != 113
	}
	return a < 224
}
